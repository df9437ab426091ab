"""Teachers whose p was kept in a few numbers (data_prep/signal.py): training needs no target.

They are for drafters that read tokens only. What they know of p enters the losses as buckets (see
TargetRows): the ids that were kept, then everything else.

Ids outside of a reduced draft vocabulary D are left out and their mass is not spread over the rest,
as with the whole of p. The tail is the mass of every id that was not kept; how much of it lies
outside of D is not known, so all of it is expected of the drafter's tail. With D the tokens that
the target itself uses most, that is a few per cent too much at most.

Shape legend: N rows, U teacher positions, K kept ids of a row, D draft vocabulary, V target
vocabulary.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from data_prep.pipeline import Dataset
from data_prep.shards import ShardReader
from data_prep.signal import NOTHING, Sampled, Signal, SignalRows, TopK
from models.target import Target
from train.lesson import draft_labels
from train.losses import CrossEntropy, ForwardKL, RowLoss, TargetRows, Tempered, WeightedSum
from train.mix import MixedReader
from train.teacher import Teacher


class CachedTeacher(Teacher):
    """Base: a signal, and how it is read. Batches without one (on-policy) run the target."""

    def __init__(self, *, target: Target, signal: Signal) -> None:
        super().__init__(target=target, source="online")
        self.online = False
        self.signal = signal.name
        self._kept = signal

    def choose_source(
        self, reader: ShardReader | MixedReader, layers: tuple[int, ...] | None
    ) -> None:
        """Refuse a drafter that reads features and a dataset without the signal."""
        if layers is not None:
            raise ValueError(
                f"The teacher '{self.signal}' keeps a few probabilities of the target and none of "
                "its features, but this drafter reads features; use teacher=auto, which knows all "
                "of p once features are there, or a drafter that reads tokens only."
            )
        self._check_signals(reader.signals, str(reader.folder))

    def _check_signals(self, names: Sequence[str], where: str) -> None:
        if self.signal not in names:
            raise ValueError(
                f"The teacher needs the signal '{self.signal}', but the dataset in {where} has: "
                f"{', '.join(names) or 'none'}. Capture it (dataset.capture.signal: "
                f"{self._kept.about()}), which answers nothing again, or use teacher=online."
            )

    def check(self, loss: RowLoss, dataset: Dataset) -> None:
        """Also refuses a loss that cannot be computed from what is kept."""
        self._check_signals(dataset.signals(), str(dataset.folder))
        for part in _parts(loss):
            if part.needs_features:
                raise ValueError(
                    f"{type(part).__name__} compares features, but the teacher '{self.signal}' "
                    "keeps none; use teacher=online or another loss."
                )
            if isinstance(part, Tempered) and part.needs_target:
                raise ValueError(
                    f"A loss at a temperature needs all of p, but the teacher '{self.signal}' "
                    "keeps a few probabilities of it; use the loss without a temperature, or "
                    "teacher=online."
                )

    def _draft(self, rows: SignalRows) -> Tensor:
        """The kept ids as draft-vocabulary indices, -1 for those outside."""
        if self._draft_ids_D is None:
            return rows.ids_NK
        unnamed_NK = rows.ids_NK < 0
        inside_NK = draft_labels(
            rows.ids_NK.clamp(min=0), self._draft_ids_D, self.target.vocab_size
        )
        return inside_NK.masked_fill(unnamed_NK, -1)


class TopKTeacher(CachedTeacher):
    """The k most likely ids of p, and the tail (signal TopK).

    `mode` says what is made of the tail; gradients of the forward KL in the draft's logits:

    tail          K + 1 buckets. On the K ids q - p, as with all of p; on another id
                  q (1 - p_tail / q_tail): the draft learns how much mass the others have together,
                  and keeps its own opinion of which of them.
    renormalised  p / S on the K ids (S their mass) and nothing elsewhere. Gradient q - p / S: wrong
                  by 1 / S on the head, and it teaches that the tail is impossible, so the draft
                  grows over-confident. For comparison.
    raw           p on the K ids as it is and nothing elsewhere. Gradient S q - p: S times the one
                  above, so it ends in the same place, more slowly where p is flat. For comparison.

    Of the acceptance a lower and an upper end are known, whatever the mode: sum_K min(p, q), and
    that + min(p_tail, q_tail). The argmax of p is known.
    """

    bracket = True

    def __init__(
        self,
        *,
        target: Target,
        k: int = 16,
        mode: Literal["tail", "renormalised", "raw"] = "tail",
    ) -> None:
        super().__init__(target=target, signal=TopK(k=k))
        self.mode = mode

    def stored(self, rows: SignalRows) -> TargetRows:
        return self._buckets(rows, self.mode)

    def acceptance(self, rows: SignalRows, logq_ND: Tensor) -> tuple[Tensor, Tensor]:
        known = self._buckets(rows, "tail")
        both_NC = torch.minimum(known.p_ND, known.view(logq_ND).exp())
        return both_NC[:, :-1].sum(-1), both_NC.sum(-1)

    def _buckets(self, rows: SignalRows, mode: str) -> TargetRows:
        assert rows.tail_N is not None
        ids_NK, logp_NK, tail_N = self._draft(rows), rows.logp_NK, rows.tail_N
        if mode == "renormalised":
            # Over the ids that were kept, before those outside the draft vocabulary are left out.
            logp_NK = (logp_NK - logp_NK.logsumexp(-1, keepdim=True)).clamp(min=NOTHING)
        if mode != "tail":
            tail_N = torch.full_like(tail_N, NOTHING)
        logp_NK = logp_NK.masked_fill(ids_NK < 0, NOTHING)
        return TargetRows(torch.cat([logp_NK, tail_N[:, None]], -1), ids_NK)


class SampledTeacher(CachedTeacher):
    """Counts of N draws from p (signal Sampled; RS-KD, arXiv 2503.16870).

    The target of a position is counts / N. Losses whose gradient is linear in p learn from it
    without bias: the forward KL, whose gradient is q - counts / N and so q - p on average, and
    losses that do not look at p. All others are refused: |p - q|, log p or a mean of p and q, taken
    of a noisy p, is not on average what it is of p. (The value of the forward KL is larger than
    with p, by a constant: the entropy of p less that of counts / N.)

    The acceptance is estimated without bias: sum_x counts_x / N min(1, q_x / p_x).
    """

    def __init__(self, *, target: Target, draws: int = 50, seed: int = 0) -> None:
        super().__init__(target=target, signal=Sampled(draws=draws, seed=seed))
        self.draws = draws

    def check(self, loss: RowLoss, dataset: Dataset) -> None:
        super().check(loss, dataset)
        for part in _parts(loss):
            if part.needs_target and not isinstance(part, ForwardKL):
                raise ValueError(
                    f"{type(part).__name__} cannot be learned from counts of draws: its gradient "
                    "is not linear in p, so that of a noisy p is biased. Use loss=forward_kl (and "
                    f"{CrossEntropy.__name__} beside it), or teacher=topk or teacher=online."
                )

    def stored(self, rows: SignalRows) -> TargetRows:
        assert rows.counts_NK is not None
        ids_NK = self._draft(rows)
        logp_NK = (rows.counts_NK / self.draws).log().clamp(min=NOTHING)
        logp_NK = logp_NK.masked_fill(ids_NK < 0, NOTHING)
        return TargetRows(torch.nn.functional.pad(logp_NK, (0, 1), value=NOTHING), ids_NK)

    def acceptance(self, rows: SignalRows, logq_ND: Tensor) -> tuple[Tensor, Tensor]:
        assert rows.counts_NK is not None
        ids_NK = self._draft(rows)
        logq_NK = TargetRows(rows.logp_NK, ids_NK).view(logq_ND)[:, :-1]
        ratio_NK = (logq_NK - rows.logp_NK).clamp(max=0.0).exp()
        drawn_NK = (rows.counts_NK / self.draws).masked_fill(ids_NK < 0, 0.0)
        estimate_N = (drawn_NK * ratio_NK).sum(-1)
        return estimate_N, estimate_N


def _parts(loss: RowLoss) -> list[RowLoss]:
    """The losses that a weighted sum is made of; a single one is its own only part."""
    if isinstance(loss, WeightedSum):
        return [part for term in loss.terms.values() for part in _parts(term.loss)]
    return [loss]
