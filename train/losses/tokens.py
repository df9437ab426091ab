"""Losses on the token that came, without the target's distribution.

Shape legend: N rows, D draft vocabulary.
"""

import torch
from torch import Tensor

from train.losses.base import RowLoss, Rows


class CrossEntropy(RowLoss):
    """-log q(y) for the token y that came (Medusa-1, arXiv 2401.10774). Gradient: q - onehot(y).

    A row whose y lies outside the draft vocabulary contributes nothing: there is no logit to raise.
    It still counts in the normaliser, like every token to learn.
    """

    def __call__(self, rows: Rows) -> Tensor:
        known_N = rows.label_N >= 0
        logq_N = rows.logq_ND.gather(-1, rows.label_N.clamp(min=0)[:, None])[:, 0]
        return torch.where(known_N, -logq_N, torch.zeros_like(logq_N))
