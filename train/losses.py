"""Row losses: what one draft distribution q should learn from the target's p at one position.

Every loss is a `RowLoss` with one signature, `Rows -> [N]`, so that the projection can run in
chunks of rows and a new loss is a new class in this file and nothing else.

p is the target, q is the draft. With a reduced draft vocabulary D, q has no mass outside D, while p
keeps its full-vocabulary probabilities inside D: p_v = exp(W_v f - logZ), with logZ over all V
tokens. The mass outside is left out, not spread over D: drafts are accepted against the full p.

Shape legend: N rows, D draft vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetRows:
    """log p restricted to the draft vocabulary, fp32 and finite. Its exp sums to at most 1.

    The derived tensors are computed once and shared by all depths that this position teaches.
    """

    logp_ND: Tensor

    @cached_property
    def p_ND(self) -> Tensor:
        return self.logp_ND.exp()

    @cached_property
    def negative_entropy_N(self) -> Tensor:
        """sum_v p_v log p_v over the draft vocabulary."""
        return (self.p_ND * self.logp_ND).sum(-1)

    def take(self, index_N: Tensor) -> "TargetRows":
        """The same for a choice of rows."""
        taken = TargetRows(self.logp_ND[index_N])
        for name in ("p_ND", "negative_entropy_N"):
            if name in self.__dict__:
                taken.__dict__[name] = self.__dict__[name][index_N]
        return taken


@dataclass(frozen=True)
class Rows:
    """What a loss may look at.

    `logq_ND` is the draft's log-softmax in fp32. `label_N` is the draft-vocabulary index of the
    token that came, -1 when it lies outside. `target` is None unless the loss asks for it.
    """

    logq_ND: Tensor
    label_N: Tensor
    target: TargetRows | None = None


class RowLoss(ABC):
    """A loss of single rows. `needs_target`: whether p has to be computed at all."""

    needs_target: bool = False

    @abstractmethod
    def __call__(self, rows: Rows) -> Tensor:
        """One loss per row, `[N]`, fp32, differentiable in `rows.logq_ND`."""


class CrossEntropy(RowLoss):
    """-log q(y) for the token y that came (Medusa-1, arXiv 2401.10774). Gradient: q - onehot(y).

    A row whose y lies outside the draft vocabulary contributes nothing: there is no logit to raise.
    It still counts in the normaliser, like every token to learn.
    """

    def __call__(self, rows: Rows) -> Tensor:
        known_N = rows.label_N >= 0
        logq_N = rows.logq_ND.gather(-1, rows.label_N.clamp(min=0)[:, None])[:, 0]
        return torch.where(known_N, -logq_N, torch.zeros_like(logq_N))


class ForwardKL(RowLoss):
    """KL(p || q) = sum_v p_v (log p_v - log q_v): soft cross-entropy less the entropy of p.

    The entropy does not depend on q, so this trains exactly like the soft cross-entropy of Hydra++
    (arXiv 2402.05109, "teacher loss") and DistillSpec's FKL (arXiv 2310.08461), while its value is
    0 where q = p. The sum runs over the draft vocabulary with p's full-vocabulary mass P_D <= 1
    there. Gradient in the draft logits: P_D q - p.
    """

    needs_target = True

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.target is not None
        cross_N = (rows.target.p_ND * rows.logq_ND).sum(-1)
        return rows.target.negative_entropy_N - cross_N


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
