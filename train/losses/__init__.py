"""Row losses: what one draft distribution q should learn from the target's p at one position."""

from train.losses.base import RowLoss, Rows, TargetRows
from train.losses.combine import Term, WeightedSum
from train.losses.kl import ForwardKL
from train.losses.tokens import CrossEntropy

__all__ = [
    "CrossEntropy",
    "ForwardKL",
    "RowLoss",
    "Rows",
    "TargetRows",
    "Term",
    "WeightedSum",
]
