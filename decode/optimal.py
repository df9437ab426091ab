"""The most that siblings of one node can be accepted, whatever the rule (Hu et al., 2025, arXiv
2502.18779).

A lossless rule gives the next token the law p; a draft is accepted when that token is one of the k
drafts x_1..x_k at the node. Over all joint laws of drafts and next token the best chance of that is

    alpha* = 1 + min over sets H of ids of [P(H) - Q(H)],   P(H) = sum_{v in H} p(v),
                                                            Q(H) = Pr(all k drafts lie in H)

because drafts inside H can only be met by a token of H.

Shape legend: V vocabulary, U ids with draft mass, R draws.
"""

import torch
from torch import Tensor

POINTS = 2**13
"""Points of the integral over draws without replacement: good to about 1e-3."""


def optimal_acceptance(p_V: Tensor, q_V: Tensor, count: int) -> float:
    """alpha* of `count` independent drafts from q: exact, in O(V log V).

    Q(H) = q(H)^k, and the best H holds the ids with the largest q / p.
    """
    p_U, q_U = _by_ratio(p_V, q_V)
    return 1.0 + min(0.0, float((p_U.cumsum(-1) - q_U.cumsum(-1) ** count).min()))


def acceptance_bound(p_V: Tensor, q_V: Tensor, count: int) -> float:
    """At least alpha* of `count` drafts drawn one after another without replacement.

    The same sets H as above, which need not hold the best one here: the minimum over fewer sets is
    no smaller. Q(H) is an integral over the uniform numbers behind the draws, on a Sobol lattice.
    Where q holds no more than `count` ids, all of them are drafted.
    """
    p_U, q_U = _by_ratio(p_V, q_V)
    if len(q_U) <= count:
        return float(p_U.sum())
    last_R = _last_place(q_U, count)
    inside_U = torch.bincount(last_R, minlength=len(q_U)).cumsum(-1) / len(last_R)
    return 1.0 + min(0.0, float((p_U.cumsum(-1) - inside_U).min()))


def _by_ratio(p_V: Tensor, q_V: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of the ids with draft mass, the largest q / p first. An id without draft mass adds to
    P(H) only and is in no best H."""
    p_V, q_V = p_V.double().cpu(), q_V.double().cpu()
    drafted_V = q_V > 0.0
    p_U, q_U = p_V[drafted_V], q_V[drafted_V]
    order_U = (p_U / q_U).argsort()
    return p_U[order_U], q_U[order_U] / q_U.sum()


def _last_place(q_U: Tensor, count: int) -> Tensor:
    """For each of R sets of `count` draws without replacement, the largest index drawn."""
    uniform_RC = torch.quasirandom.SobolEngine(count).draw(POINTS, dtype=torch.double)
    uniform_RC = uniform_RC + 0.5 / POINTS  # the lattice begins at 0
    cdf_U = q_U.cumsum(-1)
    before_U = cdf_U - q_U
    places_RC = torch.empty(POINTS, 0, dtype=torch.long)
    for i in range(count):
        # A point in the mass that is left, then moved over the gaps below it, lowest gap first.
        gaps_RC = places_RC.sort(-1).values
        left_R = 1.0 - q_U[places_RC].sum(-1)
        point_R = uniform_RC[:, i] * left_R
        for gap_R in gaps_RC.unbind(-1):
            point_R = point_R + q_U[gap_R] * (point_R >= before_U[gap_R])
        place_R = torch.searchsorted(cdf_U, point_R, right=True).clamp(max=len(q_U) - 1)
        places_RC = torch.cat([places_RC, place_R[:, None]], dim=-1)
    return places_RC.amax(-1)
