"""The teacher: the target's features and its distribution p, from shards or computed in the step.

From shards: f_t (and inner layers) and logZ_t are read from disk. Online: the target runs inside
the training step, and logZ is computed for the positions that count, in chunks of the vocabulary.

Shape legend: B sequences, S context positions, T positions of the training window, n rows,
d hidden size, V target vocabulary, D draft vocabulary.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.console import say
from data_prep.pipeline import Dataset
from data_prep.shards import ShardReader
from data_prep.signal import SignalRows
from models.target import Features, Target
from train.data import Batch
from train.losses import RowLoss, TargetLogits, TargetRows
from train.mix import MixedReader


class Teacher:
    """Knows p = softmax(W f) over the full vocabulary, and log p at the draft ids.

    `source` is "shards" (refuses a dataset without feature shards), "online", or "auto": shards
    where the dataset has them with the layers the drafter reads, else online, and says which.
    """

    def __init__(
        self,
        *,
        target: Target,
        source: Literal["auto", "online", "shards"] = "auto",
        vocab_chunk: int = 8192,
    ) -> None:
        self.target = target
        self.source = source
        self.vocab_chunk = vocab_chunk
        self.online = source != "shards"
        self._weight_Dd: Tensor | None = None
        self._bias_D: Tensor | None = None
        self._draft_ids_D: Tensor | None = None

    signal: str | None = None
    """The signal that batches carry instead of features (train/cached.py)."""
    bracket: bool = False
    """Whether the acceptance is known as a lower and an upper end only."""

    def choose_source(
        self, reader: "ShardReader | MixedReader", layers: tuple[int, ...] | None
    ) -> None:
        """Decide between shards and online, or refuse what was asked for.

        `layers` are the inner layers the drafter reads; None when it reads no features at all.
        """
        stored, layers = reader.layers, layers or ()
        usable = stored is not None and set(layers) <= set(stored)
        if self.source == "shards" and not usable:
            what = "has no feature shards" if stored is None else f"holds layers {list(stored)}"
            raise ValueError(
                f"teacher.source=shards needs feature shards with the final hidden state and "
                f"layers {list(layers)}, but the dataset in {reader.folder} {what}; capture them "
                "(dataset.capture) or use teacher=online."
            )
        self.online = self.source == "online" or not usable
        if self.source == "auto":
            where = "computed in every step (no feature shards)" if self.online else "from shards"
            say(f"Teacher: the target's features are {where}.")

    def check(self, loss: RowLoss, dataset: Dataset) -> None:
        """Raises ValueError, before anything is answered, for what this teacher cannot teach."""
        return

    def stored(self, rows: SignalRows) -> TargetRows:
        """log p from what batches carry of it, `[N]` rows."""
        raise NotImplementedError("only a teacher with a signal reads one")

    def acceptance(self, rows: SignalRows, logq_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What is known of sum_v min(p_v, q_v) from a signal: lower and upper end, `[N]` each."""
        raise NotImplementedError("only a teacher with a signal reads one")

    def set_vocab(self, draft_ids_D: Tensor | None) -> None:
        """Restrict p to these ids (None: all of them)."""
        self._draft_ids_D = draft_ids_D
        self._weight_Dd, self._bias_D = self._head_rows(
            slice(None) if draft_ids_D is None else draft_ids_D
        )

    @torch.no_grad()
    def features(self, batch: Batch, layers: tuple[int, ...]) -> tuple[Features, Tensor | None]:
        """Features over the training window, and logZ where it is stored."""
        if batch.features is not None:
            return batch.features, batch.logz_BT
        assert batch.context_BS is not None, "a batch has either features or the whole context"
        assert batch.start_B is not None
        B, T = batch.tokens_BT.shape
        S = batch.context_BS.shape[1]
        # The target itself runs in its own dtype. Right padding, so no mask is needed: a position
        # never sees what follows it.
        with torch.autocast(self.target.device.type, enabled=False):
            whole = self.target.forward(batch.context_BS, layers=layers)
        if S == T:
            return whole, None
        window_BT = batch.start_B[:, None] + torch.arange(T, device=batch.start_B.device)
        rows_B1 = torch.arange(B, device=batch.start_B.device)[:, None]
        return whole[rows_B1, window_BT.clamp(max=S - 1)], None

    @torch.no_grad()
    def rows(self, final_nd: Tensor, logz_n: Tensor | None) -> TargetLogits:
        """The logits W[ids] f at the draft ids, and logZ over the full vocabulary.

        `TargetLogits.take` makes log p = logits - logZ of them, fp32, for a few rows at a time.
        """
        assert self._weight_Dd is not None, "set_vocab comes before rows"
        if logz_n is None and self._draft_ids_D is not None:
            logz_n = self.full(final_nd)[0]
        with torch.autocast(final_nd.device.type, enabled=False):
            logits_nD = F.linear(final_nd.to(self._weight_Dd.dtype), self._weight_Dd, self._bias_D)
        return TargetLogits(logits_nD, logz_n, self._cap)

    @torch.no_grad()
    def full(self, final_nd: Tensor) -> tuple[Tensor, Tensor]:
        """logZ and argmax of all V logits, `[n]` each, with [n, vocab_chunk] logits alive."""
        logz_n = torch.full((len(final_nd),), float("-inf"), device=final_nd.device)
        best_n, argmax_n = logz_n.clone(), torch.zeros_like(logz_n, dtype=torch.long)
        with torch.autocast(final_nd.device.type, enabled=False):
            for start, logits_nc in self._vocabulary(final_nd):
                logz_n = torch.logaddexp(logz_n, logits_nc.logsumexp(-1))
                top_n, where_n = logits_nc.max(-1)
                better_n = top_n > best_n
                argmax_n = torch.where(better_n, where_n + start, argmax_n)
                best_n = torch.where(better_n, top_n, best_n)
        return logz_n, argmax_n

    def _vocabulary(self, final_nd: Tensor) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.target.vocab_size, self.vocab_chunk):
            weight_cd, bias_c = self._head_rows(slice(start, start + self.vocab_chunk))
            yield start, self._logits(final_nd, weight_cd, bias_c)

    def _head_rows(self, ids: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        bias_V = getattr(self.target.model.get_output_embeddings(), "bias", None)
        return self.target.head_weight_Vd[ids], None if bias_V is None else bias_V[ids]

    def _logits(self, final_nd: Tensor, weight_cd: Tensor, bias_c: Tensor | None) -> Tensor:
        """The target's own logits (soft-capped as it does) at some ids, as fp32."""
        logits_nc = F.linear(final_nd.to(weight_cd.dtype), weight_cd, bias_c).float()
        return torch.tanh(logits_nc / self._cap) * self._cap if self._cap else logits_nc

    @property
    def _cap(self) -> float | None:
        return getattr(self.target.config, "final_logit_softcapping", None)
