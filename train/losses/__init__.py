"""Row losses: what one draft distribution q should learn from the target's p at one position."""

from train.losses.base import RowLoss, Rows, TargetLogits, TargetRows
from train.losses.combine import Tempered, Term, WeightedSum
from train.losses.features import SmoothL1
from train.losses.kl import AdaptiveKL, ForwardKL, ReverseKL, TopK
from train.losses.mixtures import JSD, SkewedKL
from train.losses.overlap import TVD, LKAlpha, LKLambda, TVDPlusPlus
from train.losses.tokens import CrossEntropy

__all__ = [
    "JSD",
    "TVD",
    "AdaptiveKL",
    "CrossEntropy",
    "ForwardKL",
    "LKAlpha",
    "LKLambda",
    "ReverseKL",
    "RowLoss",
    "Rows",
    "SkewedKL",
    "SmoothL1",
    "TVDPlusPlus",
    "TargetLogits",
    "TargetRows",
    "Tempered",
    "Term",
    "TopK",
    "WeightedSum",
]
