"""Losses made of other losses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.losses.base import RowLoss, Rows


@dataclass(kw_only=True)
class Term:
    """One loss of a weighted sum."""

    weight: float
    loss: RowLoss


class WeightedSum(RowLoss):
    """sum_i w_i loss_i over named terms; terms of weight 0 are not computed."""

    def __init__(self, *, terms: dict[str, Term]) -> None:
        self.terms = {name: term for name, term in terms.items() if term.weight != 0}
        if not self.terms:
            raise ValueError(
                f"loss.terms has no term with a weight other than 0 (given: {sorted(terms)}), so "
                "there would be nothing to learn; give at least one term a positive weight."
            )
        self.needs_target = any(term.loss.needs_target for term in self.terms.values())

    def __call__(self, rows: Rows) -> Tensor:
        return torch.stack([t.weight * t.loss(rows) for t in self.terms.values()]).sum(0)
