"""Losses on the chance alpha = sum_v min(p_v, q_v) that a draft sampled from q is accepted.

With a reduced draft vocabulary alpha is exact without any care: missing tokens add min(p, 0) = 0.

Shape legend: N rows, C columns in which p and q are compared (see base.py), S samples of a row.
"""

from typing import Literal

import torch
from torch import Tensor

from train.losses.base import RowLoss, Rows
from train.losses.kl import ForwardKL

ALPHA_FLOOR = 1e-5
SIGMA_FLOOR = 1e-6


def acceptance(rows: Rows) -> Tensor:
    """alpha `[N]`, differentiable. Gradient: q (r - E_q r) with r = 1 where q < p, else 0."""
    return torch.minimum(rows.p_NC, rows.logq_NC.exp()).sum(-1)


class TVD(RowLoss):
    """1 - alpha = sum_v |p_v - q_v| / 2 (DistillSpec, arXiv 2310.08461): what is refused.

    Gradient: q (s - E_q s) / 2, s = sign(q - p). It is proportional to q and knows only signs: from
    random weights and a large vocabulary it almost vanishes, so start from a trained draft or add a
    KL. Missing mass: refused, 1 - P_D of the value, without gradient.
    """

    needs_target = True

    def __call__(self, rows: Rows) -> Tensor:
        return 1.0 - acceptance(rows)


class LKAlpha(RowLoss):
    """-log alpha (Samarin et al., arXiv 2602.23881), with alpha at least 1e-5.

    Gradient: that of TVD divided by alpha, loud where little is accepted; for a one-hot p it is the
    cross-entropy. Missing mass: lowers alpha; the value is at least -log P_D.
    """

    needs_target = True

    def __call__(self, rows: Rows) -> Tensor:
        return -acceptance(rows).clamp(min=ALPHA_FLOOR).log()


class LKLambda(RowLoss):
    """l KL(p || q) + (1 - l) TVD with l = exp(-eta alpha) (Samarin et al., arXiv 2602.23881).

    l has no gradient: mostly the KL while little is accepted, mostly the overlap itself later
    (e^-3 = 0.05 of the KL is left at alpha = 1). `alpha` says whose acceptance decides: that of
    each "position" (as in the speculators library), or its mean over the "batch": all rows of the
    depth in the micro-batch on all ranks (as in SpecForge; one more pass). Gradient: l (P_D q - p)
    + (1 - l) that of TVD. Missing mass: as in ForwardKL and TVD.
    """

    needs_target = True

    def __init__(
        self, *, eta: float = 3.0, alpha: Literal["position", "batch"] = "position"
    ) -> None:
        if eta < 0.0:
            raise ValueError(
                f"loss.eta={eta} must not be negative: the share of the KL is exp(-eta alpha), "
                "which would exceed 1. The paper uses 3."
            )
        self.eta, self.forward_kl = eta, ForwardKL()
        self.num_statistics = 2 if alpha == "batch" else 0

    def statistics(self, rows: Rows) -> Tensor:
        """[rows, sum of alpha]"""
        alpha_N = acceptance(rows)
        return torch.stack([alpha_N.new_tensor(float(len(alpha_N))), alpha_N.sum()])

    def __call__(self, rows: Rows) -> Tensor:
        alpha_N = acceptance(rows)
        deciding = alpha_N.detach()
        if self.num_statistics:
            assert rows.statistics_S is not None
            count, total = rows.statistics_S
            deciding = total / count.clamp(min=1.0)
        share = torch.exp(-self.eta * deciding)
        return share * self.forward_kl(rows) + (1.0 - share) * (1.0 - alpha_N)


class TVDPlusPlus(RowLoss):
    """TVD as a policy gradient with a standardised advantage (Goel et al., arXiv 2403.00858).

    grad TVD = -E_{x~q}[r(x) grad log q(x)] with the reward r(x) = 1 where p(x) > q(x), else 0.
    TVD++ puts A = (r - mu) / sigma in the place of r, with mu and sigma over all drawn tokens of
    the depth's rows in the micro-batch, on all ranks (one more pass over the rows).

    exact     the expectation over q is taken in full. mu then drops out, since the gradient of
              sum_v q_v is 0, and sigma only rescales: the gradient is grad TVD / sigma, with
              sigma^2 = mu (1 - mu), mu = mean over rows of E_q r. The value is TVD / sigma.
    sampled   `samples` tokens x ~ q for each position: -mean_x A(x) log q(x), A without gradient.
              Its mean is the exact gradient; subtracting mu lowers its variance. The value has no
              meaning of its own: it is near 0 and may be negative.

    sigma is at least 1e-6, and where it is 0 (all accepted or all refused) so is the loss. The
    definitions follow from the identity above; no code of the authors is public. Missing mass: q
    sums to 1 over the draft vocabulary and r uses the full p, so the identity holds unchanged.
    """

    needs_target = True
    num_statistics = 2

    def __init__(self, *, mode: Literal["exact", "sampled"] = "exact", samples: int = 4) -> None:
        if samples < 1:
            raise ValueError(
                f"loss.samples={samples} must be at least 1: it is how many tokens are drawn from "
                "the draft at each position (mode sampled)."
            )
        self.mode = mode
        self.num_draws = samples if mode == "sampled" else 0

    def statistics(self, rows: Rows) -> Tensor:
        """[tokens, sum of rewards]; rewards are 0 or 1, so their squares sum to the same."""
        if self.mode == "sampled":
            reward_NS = self._reward(rows).gather(-1, _draw(rows))
            return torch.stack([reward_NS.new_tensor(float(reward_NS.numel())), reward_NS.sum()])
        expected_N = (rows.logq_NC.exp() * self._reward(rows)).sum(-1)
        return torch.stack([expected_N.new_tensor(float(len(expected_N))), expected_N.sum()])

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.statistics_S is not None
        count, total = rows.statistics_S
        mu = total / count.clamp(min=1.0)
        sigma = (mu * (1.0 - mu)).clamp(min=0.0).sqrt()
        per_sigma = torch.where(sigma > 0, 1.0 / sigma.clamp(min=SIGMA_FLOOR), 0.0)
        if self.mode == "exact":
            return per_sigma * (1.0 - acceptance(rows))
        drawn_NS = _draw(rows)
        advantage_NS = (self._reward(rows).gather(-1, drawn_NS) - mu) * per_sigma
        return -(advantage_NS * rows.logq_NC.gather(-1, drawn_NS)).mean(-1)

    @staticmethod
    @torch.no_grad()
    def _reward(rows: Rows) -> Tensor:
        return (rows.p_NC > rows.logq_NC.exp()).to(rows.p_NC.dtype)


@torch.no_grad()
def _draw(rows: Rows) -> Tensor:
    """Columns drawn from q: its cumulative distribution inverted at the uniform numbers."""
    assert rows.uniform_NS is not None
    cumulative_NC = rows.logq_NC.exp().cumsum(-1)
    # Rounding leaves a total near 1: scaled, a number below 1 always finds a column.
    at_NS = rows.uniform_NS.to(cumulative_NC.dtype) * cumulative_NC[:, -1:]
    drawn_NS = torch.searchsorted(cumulative_NC, at_NS.contiguous(), right=True)
    return drawn_NS.clamp(max=cumulative_NC.shape[-1] - 1)
