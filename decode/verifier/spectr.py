"""SpecTr's k-sequential selection (K-SEQ; Sun et al., 2023, arXiv 2310.15141).

Shape legend: V vocabulary.
"""

import torch
from torch import Tensor

from decode.chance import Chance
from decode.verifier.base import TargetLaw, Verdict, check_draws, children_of, draft_row
from models.drafter.base import Tree

STEPS = 24
"""Halvings of [1, k]: rho is then within k / 2^24 of its root, and never below it."""


class SpecTr:
    """Accept the first of k independent siblings that passes one and the same test.

    Rule at an accepted node with children x_1..x_k drawn independently from q: find rho in [1, k]
    with

        1 - (1 - beta)^k = rho beta,    beta = sum_v min(p(v) / rho, q(v))

    accept each child in turn with min(1, p(x) / (rho q(x))); if none was accepted draw the bonus
    token from

        norm((p - min(p / rho, q) (1 - (1 - beta)^k) / beta)+)

    beta is the chance that one child passes, so the children together give v with probability
    min(p(v) / rho, q(v)) (1 - (1 - beta)^k) / beta, at most p(v) for the root rho and every larger
    one: the rule is exact for each of them, and the root accepts most. At least 1 - 1/e of the
    optimal acceptance; with one child it is min(1, p / q).

    Unlike in recursive rejection a second draw of a token counts: it has the same chance again. Its
    node is a leaf, and the path goes on at the token's first node.
    """

    lossy = False
    greedy_only = False

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """Walk down from the root; the walk ends at the first node with no accepted child."""
        children, tokens = children_of(tree), tree.tokens_N.tolist()
        self._check(tree, max(len(some) for some in children))
        path = [0]
        while True:
            p_V = p(path[-1])
            some = children[path[-1]]
            if not some:
                return Verdict(path, chance.draw(p_V))
            q_V = draft_row(tree, some[0], p_V)
            rho = best_rho(p_V, q_V, len(some))
            for child in some:
                token = tokens[child]
                if chance.coin(float(p_V[token]) / (rho * float(q_V[token]))):
                    path.append(next(c for c in some if tokens[c] == token))
                    break
            else:
                return Verdict(path, chance.draw(_residual(p_V, q_V, rho, len(some))))

    @staticmethod
    def _check(tree: Tree, most: int) -> None:
        if most > 1 and (tree.q_NV is None or not tree.replacement):
            how = "chosen, not drawn" if tree.q_NV is None else "drawn without replacement"
            raise ValueError(
                f"verifier=spectr was given siblings that were {how}, but it needs independent "
                "draws from q, because it puts all of them to the same test; use tree=sampled "
                "tree.replacement=true, or verifier=sampling, which takes any tree."
            )
        check_draws(tree)


def best_rho(p_V: Tensor, q_V: Tensor, count: int) -> float:
    """The root rho in [1, k], from above.

    f(rho) = 1 - (1 - beta)^k - rho beta falls from f(1) >= 0 to f(k) <= 0. An id with p <= q adds
    p / rho to beta whatever rho is, one with p >= k q adds q: only the ids between are summed again
    in every step.
    """
    if count == 1:
        return 1.0
    p_V, q_V = p_V.double(), q_V.double()
    small_V, large_V = p_V <= q_V, p_V >= count * q_V
    small, large = float(p_V[small_V].sum()), float(q_V[large_V & ~small_V].sum())
    between_V = ~(small_V | large_V)
    p_U, q_U = p_V[between_V], q_V[between_V]
    low, high = 1.0, float(count)
    for _ in range(STEPS):
        rho = (low + high) / 2
        beta = small / rho + large + float(torch.minimum(p_U / rho, q_U).sum())
        if 1.0 - (1.0 - beta) ** count >= rho * beta:
            low = rho
        else:
            high = rho
    return high


def _residual(p_V: Tensor, q_V: Tensor, rho: float, count: int) -> Tensor:
    """The law of the bonus token when none of the children was accepted."""
    once_V = torch.minimum(p_V / rho, q_V)
    beta = float(once_V.sum())
    if beta <= 0.0:
        return p_V
    left_V = (p_V - once_V * ((1.0 - (1.0 - beta) ** count) / beta)).clamp_(min=0.0)
    total = float(left_V.sum())
    # No mass is left only when p = q and rho = 1, where rejection has probability 0 up to rounding.
    return left_V / total if total > 0.0 else p_V
