"""Kullback-Leibler divergences: forward, reverse, and the two mixed by how the rows differ.

Shape legend: N rows, C columns in which p and q are compared (see base.py), k columns looked at.
"""

import torch
from torch import Tensor

from train.losses.base import RowLoss, Rows


class ForwardKL(RowLoss):
    """KL(p || q) = sum_v p_v (log p_v - log q_v): soft cross-entropy less the entropy of p.

    The entropy does not depend on q, so this trains exactly like the soft cross-entropy of Hydra++
    (arXiv 2402.05109, "teacher loss") and DistillSpec's FKL (arXiv 2310.08461), while its value is
    0 where q = p. The sum runs over the draft vocabulary with p's full-vocabulary mass P_D <= 1
    there: the missing mass has no term, since its divergence is infinite whatever q does. Gradient
    in the draft logits: P_D q - p.
    """

    needs_target = True

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.target is not None
        return rows.target.negative_entropy_N - (rows.p_NC * rows.logq_NC).sum(-1)


class ReverseKL(RowLoss):
    """KL(q || p) = sum_v q_v (log q_v - log p_v) (DistillSpec's RKL, arXiv 2310.08461).

    Gradient: q (log(q/p) - RKL). Missing mass: q is 0 there, so the value is the exact divergence;
    it is at least -log P_D, which q = p / P_D reaches. A forbidden token (p = 0) would make it
    infinite: log p counts as at least log `floor`.
    """

    needs_target = True

    def __init__(self, *, floor: float = 1e-9) -> None:
        if not 0.0 < floor < 1.0:
            raise ValueError(
                f"loss.floor={floor} must lie between 0 and 1: it is the probability that tokens "
                "which the target forbids are given, so that the reverse KL stays finite."
            )
        self.log_floor = float(torch.tensor(floor).log())

    def __call__(self, rows: Rows) -> Tensor:
        logq_NC = rows.logq_NC
        return (logq_NC.exp() * (logq_NC - rows.logp_NC.clamp(min=self.log_floor))).sum(-1)


class AdaptiveKL(RowLoss):
    """(g_head FKL + g_tail RKL) / (g_head + g_tail) (AKL, Wu et al., arXiv 2404.02657).

    The head is the smallest set of most likely tokens that holds `head_mass` of p's mass (within
    the draft vocabulary), the tail is the rest; g = sum of |p - q| over each, without gradient. The
    forward KL repairs the head first, the reverse KL the tail. Gradient: the same mixture of both
    gradients, g_head (P_D q - p) + g_tail q (log(q/p) - RKL) over g_head + g_tail. Missing mass: as
    in the two divergences; it adds to neither gap. Where q = p both divergences are 0.
    """

    needs_target = True

    def __init__(self, *, head_mass: float = 0.5, floor: float = 1e-9) -> None:
        if not 0.0 < head_mass < 1.0:
            raise ValueError(
                f"loss.head_mass={head_mass} must lie between 0 and 1: it is the share of the "
                "target's probability that counts as the head of its distribution (paper: 0.5)."
            )
        self.head_mass = head_mass
        self.forward_kl, self.reverse_kl = ForwardKL(), ReverseKL(floor=floor)

    def __call__(self, rows: Rows) -> Tensor:
        with torch.no_grad():
            gap_NC = (rows.p_NC - rows.logq_NC.exp()).abs()
            head_N = (gap_NC * self._head(rows.p_NC)).sum(-1)
            both_N = gap_NC.sum(-1)
            share_N = torch.where(both_N > 0, head_N / both_N.clamp(min=1e-30), 0.5)
        return share_N * self.forward_kl(rows) + (1.0 - share_N) * self.reverse_kl(rows)

    def _head(self, p_NC: Tensor) -> Tensor:
        """True for the fewest columns that hold the wanted mass; looks at more until they do."""
        wanted_N1 = self.head_mass * p_NC.sum(-1, keepdim=True)
        k = 64
        while True:
            k = min(k, p_NC.shape[-1])
            top_Nk, where_Nk = p_NC.topk(k)
            before_Nk = top_Nk.cumsum(-1) - top_Nk
            if k == p_NC.shape[-1] or bool((top_Nk.sum(-1, keepdim=True) >= wanted_N1).all()):
                # A column belongs to the head while those before it do not hold the mass yet.
                inside_Nk = before_Nk < wanted_N1
                return torch.zeros_like(p_NC, dtype=torch.bool).scatter(-1, where_Nk, inside_Nk)
            k *= 8


class TopK(RowLoss):
    """-sum over the `k` most likely tokens of p_v log q_v (HASS, arXiv 2408.15766, k = 10).

    p is not renormalised there. Gradient: S q - p on those tokens and S q elsewhere, with S their
    mass; so it draws q towards p_K / S, not towards p, and adds to a loss that knows the rest.
    Missing mass: only tokens of the draft vocabulary are chosen from.
    """

    needs_target = True

    def __init__(self, *, k: int = 10) -> None:
        if k < 1:
            raise ValueError(f"loss.k={k} must be at least 1: it is how many tokens are learned.")
        self.k = k

    def __call__(self, rows: Rows) -> Tensor:
        top_Nk, where_Nk = rows.p_NC.topk(min(self.k, rows.p_NC.shape[-1]))
        return -(top_Nk * rows.logq_NC.gather(-1, where_Nk)).sum(-1)
