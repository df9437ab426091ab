"""Losses made of other losses.

Shape legend: N rows, D draft vocabulary, S uniform numbers of a row or statistics of a depth.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.losses.base import NEVER, RowLoss, Rows, TargetRows


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
        losses = [term.loss for term in self.terms.values()]
        self.needs_target = any(loss.needs_target for loss in losses)
        self.needs_features = any(loss.needs_features for loss in losses)
        self.num_draws = sum(loss.num_draws for loss in losses)
        self.num_statistics = sum(loss.num_statistics for loss in losses)

    def statistics(self, rows: Rows) -> Tensor:
        """Those of all terms, one behind the other."""
        return torch.cat(
            [t.loss.statistics(own) for t, own in self._given(rows) if t.loss.num_statistics]
        )

    def __call__(self, rows: Rows) -> Tensor:
        return torch.stack([t.weight * t.loss(own) for t, own in self._given(rows)]).sum(0)

    def _given(self, rows: Rows) -> list[tuple[Term, Rows]]:
        """Each term with its own share of the draws and statistics."""
        given, draw, statistic = [], 0, 0
        for term in self.terms.values():
            own = rows
            if term.loss.num_draws:
                assert rows.uniform_NS is not None
                mine_NS = rows.uniform_NS[:, draw : draw + term.loss.num_draws]
                own = replace(own, uniform_NS=mine_NS)
            if term.loss.num_statistics and rows.statistics_S is not None:
                mine_S = rows.statistics_S[statistic : statistic + term.loss.num_statistics]
                own = replace(own, statistics_S=mine_S)
            draw += term.loss.num_draws
            statistic += term.loss.num_statistics
            given.append((term, own))
        return given


class Tempered(RowLoss):
    """Another loss, of p and q at a temperature: both logits divided by T (Hinton et al., 2015).

    The gradient becomes (q_T - p_T) / T for the forward KL, about 1/T^2 of before; `square` puts
    the factor T^2 back (TRL's GKD leaves it out, at T = 0.9). A training device: acceptance is
    decided at the temperature of serving, and measured there. Missing mass: p's normaliser at T is
    known over the draft vocabulary only, so p keeps the mass P_D that it has there at T = 1.

    A target known in buckets has no temperature (the shape of its tail is unknown): ValueError.
    """

    def __init__(self, *, loss: RowLoss, temperature: float, square: bool = True) -> None:
        if temperature <= 0.0:
            raise ValueError(
                f"loss.temperature={temperature} must be positive, because logits are divided by "
                "it; for learning the most likely token alone use loss=cross_entropy."
            )
        self.loss, self.temperature = loss, temperature
        self.scale = temperature**2 if square else 1.0
        self.needs_target, self.needs_features = loss.needs_target, loss.needs_features
        self.num_draws, self.num_statistics = loss.num_draws, loss.num_statistics

    def statistics(self, rows: Rows) -> Tensor:
        """Those of the other loss at the temperature."""
        return self.loss.statistics(self._tempered(rows))

    def __call__(self, rows: Rows) -> Tensor:
        return self.scale * self.loss(self._tempered(rows))

    def _tempered(self, rows: Rows) -> Rows:
        logq_ND = (rows.logq_ND / self.temperature).log_softmax(-1)
        return replace(rows, logq_ND=logq_ND, target=self._cooled(rows.target))

    def _cooled(self, target: TargetRows | None) -> TargetRows | None:
        if target is None:
            return None
        if target.ids_NK is not None:
            raise ValueError(
                "A loss at a temperature needs the target's whole distribution, but this dataset "
                "stores a few tokens and a tail, whose shape is unknown; use the loss without a "
                "temperature, or teacher=online."
            )
        mass_N1 = target.logp_ND.logsumexp(-1, keepdim=True)
        logp_ND = (target.logp_ND / self.temperature).log_softmax(-1) + mass_N1
        return TargetRows(logp_ND.clamp(min=NEVER))
