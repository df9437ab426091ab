"""What every row loss is given, and what it returns.

Every loss is a `RowLoss` with one signature, `Rows -> [N]`, so that the projection can run in
chunks of rows and a new loss is a new class and nothing else.

p is the target, q is the draft. With a reduced draft vocabulary D, q has no mass outside D, while p
keeps its full-vocabulary probabilities inside D: p_v = exp(W_v f - logZ), with logZ over all V
tokens. The mass outside is left out, not spread over D: drafts are accepted against the full p.
Every loss says what the missing mass 1 - P_D, with P_D = sum_{v in D} p_v, does to it.

Shape legend: N rows, D draft vocabulary, K named ids of a row, C columns in which p and q are
compared: the D tokens, or K + 1 buckets.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = -1e4
"""A log-probability that stands for 0: finite, so that p log p is 0, and its exp is 0 in fp32."""


@dataclass(frozen=True)
class TargetRows:
    """log p restricted to the draft vocabulary, fp32 and finite. Its exp sums to at most 1.

    Without `ids_NK` the columns of `logp_ND` are the draft vocabulary. With it they are K + 1
    buckets: the K draft-vocabulary ids named for each row (in any order, each at most once; -1
    leaves a bucket empty, with log p = -1e4), then everything else, the tail.

    The derived tensors are computed once and shared by all depths that this position teaches.
    """

    logp_ND: Tensor
    ids_NK: Tensor | None = None

    @cached_property
    def p_ND(self) -> Tensor:
        return self.logp_ND.exp()

    @cached_property
    def negative_entropy_N(self) -> Tensor:
        """sum_v p_v log p_v over the columns."""
        return (self.p_ND * self.logp_ND).sum(-1)

    def view(self, logq_ND: Tensor) -> Tensor:
        """log q in the columns of log p: unchanged without ids, else K + 1 buckets.

        The tail is the log-sum-exp of what was not named: log(1 - sum) would cancel.
        """
        if self.ids_NK is None:
            return logq_ND
        unused_NK = self.ids_NK < 0
        # Empty buckets read an extra column that holds no mass.
        padded_ND = F.pad(logq_ND, (0, 1), value=NEVER)
        ids_NK = self.ids_NK.masked_fill(unused_NK, logq_ND.shape[-1])
        tail_N1 = padded_ND.scatter(-1, ids_NK, NEVER).logsumexp(-1, keepdim=True)
        return torch.cat([padded_ND.gather(-1, ids_NK), tail_N1], -1)

    def take(self, index_N: Tensor | slice) -> "TargetRows":
        """The same for a choice of rows."""
        ids_NK = None if self.ids_NK is None else self.ids_NK[index_N]
        taken = TargetRows(self.logp_ND[index_N], ids_NK)
        for name in ("p_ND", "negative_entropy_N"):
            if name in self.__dict__:
                taken.__dict__[name] = self.__dict__[name][index_N]
        return taken


@dataclass(frozen=True)
class TargetLogits:
    """The target's logits at the draft vocabulary, in the dtype they were computed in.

    Many rows are projected at once; the fp32 log p = logits - logZ is made for a few rows at a
    time, by `take`. `logz_N` is None where the columns are the whole vocabulary; `cap` is the
    target's soft cap, cap tanh(logits / cap).
    """

    logits_ND: Tensor
    logz_N: Tensor | None = None
    cap: float | None = None

    def take(self, index_N: Tensor | slice) -> TargetRows:
        """log p of some rows."""
        logp_nD = self.logits_ND[index_N].to(torch.float32, copy=True)
        if self.cap:
            logp_nD.div_(self.cap).tanh_().mul_(self.cap)
        logz_n = logp_nD.logsumexp(-1) if self.logz_N is None else self.logz_N[index_N]
        # Finite, so that p log p is 0 for forbidden ids.
        return TargetRows(logp_nD.sub_(logz_n[:, None]).clamp_(min=NEVER))

    @property
    def logp_ND(self) -> Tensor:
        """log p of all rows."""
        return self.take(slice(None)).logp_ND


@dataclass(frozen=True)
class Rows:
    """What a loss may look at.

    `logq_ND` is the draft's log-softmax in fp32, over the whole draft vocabulary. `label_N` is the
    draft-vocabulary index of the token that came, -1 when it lies outside. `target` is None unless
    the loss asks for it; where it is given, `logq_NC` has the columns of its log p.

    `feature_Nd` and `target_feature_Nd` are a predicted feature and f_{t+shift} (needs_features).
    `uniform_NS` are numbers in [0, 1) to draw with (num_draws), the same in every pass over a row.
    `statistics_S` are the sums of `RowLoss.statistics` over all rows of this depth in the
    micro-batch, on all ranks (num_statistics).
    """

    logq_ND: Tensor
    label_N: Tensor
    target: TargetRows | None = None
    feature_Nd: Tensor | None = None
    target_feature_Nd: Tensor | None = None
    uniform_NS: Tensor | None = None
    statistics_S: Tensor | None = None

    @cached_property
    def logq_NC(self) -> Tensor:
        assert self.target is not None, "a loss that compares with p sets needs_target"
        return self.target.view(self.logq_ND)

    @property
    def logp_NC(self) -> Tensor:
        assert self.target is not None
        return self.target.logp_ND

    @property
    def p_NC(self) -> Tensor:
        assert self.target is not None
        return self.target.p_ND

    @property
    def outside_N(self) -> Tensor:
        """1 - P_D: the mass of p that no draft can reach."""
        return (1.0 - self.p_NC.sum(-1)).clamp(min=0.0)


class RowLoss(ABC):
    """A loss of single rows.

    A loss that depends on the whole micro-batch (a mean, a standard deviation) says so by
    `num_statistics`: before the pass that takes gradients, all rows are walked once without them,
    `statistics` of each chunk are added up, over ranks too, and every row then sees the sums.
    """

    needs_target: bool = False
    """Whether p has to be computed at all."""
    needs_features: bool = False
    """Whether it compares predicted features with the target's."""
    num_draws: int = 0
    """How many uniform numbers it wants for each row."""
    num_statistics: int = 0
    """How many sums over all rows it wants; 0 saves the pass that makes them."""

    @abstractmethod
    def __call__(self, rows: Rows) -> Tensor:
        """One loss per row, `[N]`, fp32, differentiable in `rows.logq_ND` and `feature_Nd`."""

    def statistics(self, rows: Rows) -> Tensor:
        """Sums `[num_statistics]` over these rows."""
        raise NotImplementedError
