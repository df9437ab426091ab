"""Divergences to a mixture m of p and q: finite whatever the two are.

log m comes from the two logarithms (log-add-exp), never from a sum of probabilities.

Shape legend: N rows, C columns in which p and q are compared (see base.py).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from train.losses.base import RowLoss, Rows


def _log_mixture(logp_NC: Tensor, logq_NC: Tensor, share_p: float) -> Tensor:
    """log(share_p p + (1 - share_p) q)."""
    return torch.logaddexp(logp_NC + math.log(share_p), logq_NC + math.log1p(-share_p))


class JSD(RowLoss):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    The convention is TRL's: beta is the weight of the target in m. Scale: between 0 and the entropy
    of (beta, 1 - beta), at most log 2. At the ends the formula is 0, because its scale vanishes: it
    tends to beta KL(p || q) as beta -> 0 and to (1 - beta) KL(q || p) as beta -> 1. (TRL puts the
    full forward or reverse KL at exactly 0 and 1: a jump in scale. Here those are ForwardKL and
    ReverseKL, and beta lies strictly between.) Compare betas by dividing by beta (1 - beta).

    Gradient: (1 - beta) q (l - E_q l), l = log(q/m). Missing mass: q is 0 there, m = beta p, which
    leaves the constant (1 - P_D) beta log(1/beta); it is part of the value, so that it is the JSD
    of the full distributions.
    """

    needs_target = True

    def __init__(self, *, beta: float = 0.5) -> None:
        if not 0.0 < beta < 1.0:
            raise ValueError(
                f"loss.beta={beta} must lie strictly between 0 and 1, because the divergence is 0 "
                "at both ends; use loss=forward_kl for beta -> 0 (mean-seeking) or "
                "loss=reverse_kl for beta -> 1 (mode-seeking)."
            )
        self.beta = beta

    def __call__(self, rows: Rows) -> Tensor:
        logp_NC, logq_NC, beta = rows.logp_NC, rows.logq_NC, self.beta
        logm_NC = _log_mixture(logp_NC, logq_NC, beta)
        from_p_N = (rows.p_NC * (logp_NC - logm_NC)).sum(-1) - rows.outside_N * math.log(beta)
        from_q_N = (logq_NC.exp() * (logq_NC - logm_NC)).sum(-1)
        return beta * from_p_N + (1.0 - beta) * from_q_N


class SkewedKL(RowLoss):
    """DistiLLM's skewed divergences (arXiv 2402.03898), `skew` lambda = 0.1 there.

    forward   KL(p || lambda p + (1 - lambda) q)
              gradient -(1 - lambda) q (p/m - E_q[p/m])
    reverse   KL(q || (1 - lambda) p + lambda q)
              gradient q (g - E_q g), g = log(q/m) - lambda q/m

    Mixing in a little of the first argument bounds both (by log 1/lambda) and their gradients.
    Missing mass: forward, m = lambda p there, a constant (1 - P_D) log(1/lambda) that is part of
    the value; reverse, q is 0 there and nothing is added.
    """

    needs_target = True

    def __init__(
        self, *, direction: Literal["forward", "reverse"] = "forward", skew: float = 0.1
    ) -> None:
        if not 0.0 < skew < 1.0:
            raise ValueError(
                f"loss.skew={skew} must lie strictly between 0 and 1: at 0 this is loss=forward_kl "
                "or loss=reverse_kl, at 1 a distribution is compared with itself."
            )
        self.direction, self.skew = direction, skew

    def __call__(self, rows: Rows) -> Tensor:
        logp_NC, logq_NC = rows.logp_NC, rows.logq_NC
        if self.direction == "forward":
            logm_NC = _log_mixture(logp_NC, logq_NC, self.skew)
            inside_N = (rows.p_NC * (logp_NC - logm_NC)).sum(-1)
            return inside_N - rows.outside_N * math.log(self.skew)
        logm_NC = _log_mixture(logp_NC, logq_NC, 1.0 - self.skew)
        return (logq_NC.exp() * (logq_NC - logm_NC)).sum(-1)
