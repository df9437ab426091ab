"""Losses on predicted features.

Shape legend: N rows, d hidden size.
"""

from torch import Tensor
from torch.nn import functional as F

from train.losses.base import RowLoss, Rows


class SmoothL1(RowLoss):
    """Mean over the d components of huber(g - f): how far a predicted feature is from the target's.

    huber(e) = e^2 / (2 delta) for |e| < delta, else |e| - delta/2 (EAGLE, arXiv 2401.15077,
    delta = 1). g is the depth's `feature_BNd` and f = f_{t+shift}, the feature that teaches the
    same row. Gradient: clamp((g - f) / delta, -1, 1) / d in g; none in the draft logits. EAGLE adds
    1.0 of it to 0.1 of the soft cross-entropy. It does not see the vocabulary.
    """

    needs_features = True

    def __init__(self, *, delta: float = 1.0) -> None:
        if delta <= 0.0:
            raise ValueError(
                f"loss.delta={delta} must be positive: it is the error at which the square turns "
                "into the absolute value."
            )
        self.delta = delta

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.feature_Nd is not None
        assert rows.target_feature_Nd is not None
        taught_Nd = rows.target_feature_Nd.to(rows.feature_Nd.dtype)
        loss_Nd = F.smooth_l1_loss(rows.feature_Nd, taught_Nd, reduction="none", beta=self.delta)
        return loss_Nd.mean(-1)
