"""Signals: what is kept of the target's p at the positions that teach, instead of whole features.

Position u teaches iff token u+1 is one to learn; nothing is kept of the others, because no loss and
no measure ever looks at p there. A signal keeps a few ids of each such position, most likely first,
so that the first is always the argmax of p:

    TopK     the k most likely ids with log p, and the log of the mass of all others (the tail)
    Sampled  the distinct ids among N draws from p, how often each was drawn, and log p of each
             (RS-KD, "Sparse Logit Sampling", arXiv 2503.16870)

p is always over the full vocabulary. Kept exactly: ids and counts. log p is kept in fp16, which
moves it by at most 2^-11 |log p|, so a probability by at most 2^-11 |p log p| <= 1.8e-4 (relative:
0.5 % at p = 5e-5). The tail is summed in fp32 before, not taken as one less the rest.

Shape legend: N positions in order, K most entries of a position, E entries of all positions end to
end, S draws, V target vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.sampling import draw_many, probabilities

NOTHING = -1e4
"""log of a probability that is 0: finite, so that p log p is 0."""
MOST_ENTRIES = 255
"""Entries of a position: their number, and each count, is one byte."""


@dataclass(frozen=True)
class SignalRows:
    """What is known of p at N positions.

    `ids_NK` holds target ids, most likely first, then -1 where a position has fewer. `logp_NK` is
    log p of them (fp32, `NOTHING` beside a -1). `tail_N` is the log of the mass of all ids that are
    not named, None where it is not known. `counts_NK` says how often each was drawn, None where
    nothing was drawn; the argmax is there even when it never was, with count 0.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    tail_N: Tensor | None = None
    counts_NK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, rows: slice | Tensor) -> "SignalRows":
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "SignalRows":
        """Move every tensor."""
        return self._each(lambda tensor: tensor.to(device))

    @property
    def best_N(self) -> Tensor:
        """The argmax of p."""
        return self.ids_NK[:, 0]

    @staticmethod
    def join(parts: Sequence["SignalRows"]) -> "SignalRows":
        """Positions one behind the other."""
        width = max(part.ids_NK.shape[1] for part in parts)

        def joined(name: str, filler: float) -> Tensor:
            columns = [getattr(part, name) for part in parts]
            return torch.cat([F.pad(c, (0, width - c.shape[1]), value=filler) for c in columns])

        return SignalRows(
            joined("ids_NK", -1),
            joined("logp_NK", NOTHING),
            None if parts[0].tail_N is None else torch.cat([p.tail_N for p in parts]),  # type: ignore[misc]
            None if parts[0].counts_NK is None else joined("counts_NK", 0),
        )

    def _each(self, function: Callable[[Tensor], Tensor]) -> "SignalRows":
        return SignalRows(
            function(self.ids_NK),
            function(self.logp_NK),
            None if self.tail_N is None else function(self.tail_N),
            None if self.counts_NK is None else function(self.counts_NK),
        )


class Signal(ABC):
    """What to keep of p. Its name says all settings, so that several lie side by side."""

    seed: int = 0
    """Where draws come from, beside an example's id."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The first part of its shards' names, such as topk16."""

    @property
    @abstractmethod
    def most(self) -> int:
        """Entries of a position, at most."""

    @abstractmethod
    def take(self, logits_NV: Tensor, noise: torch.Generator) -> SignalRows:
        """What is kept of softmax(logits), in full precision. `noise` is a CPU generator."""

    def about(self) -> dict[str, Any]:
        """The settings, for the manifest."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"} | vars(self)

    def check(self, vocab_size: int) -> None:
        """Raises ValueError when the settings do not fit a vocabulary of this size."""
        return


class TopK(Signal):
    """The k most likely ids, and how much mass the others have together.

    Bytes a position: k (b + 2) + 3 with b the bytes of an id (2 up to 65,536 ids, else 4).
    """

    def __init__(self, *, k: int = 16) -> None:
        if not 1 <= k <= MOST_ENTRIES:
            raise ValueError(
                f"TopK(k={k}) should keep between 1 and {MOST_ENTRIES} ids of a position, because "
                "their number is kept as one byte; give e.g. k=16."
            )
        self.k = k

    @property
    def name(self) -> str:
        return f"topk{self.k}"

    @property
    def most(self) -> int:
        return self.k

    def check(self, vocab_size: int) -> None:
        if self.k >= vocab_size:
            raise ValueError(
                f"TopK(k={self.k}) should be less than the target's vocabulary of {vocab_size}, "
                "because something must be left over for the tail; give a smaller k."
            )

    def take(self, logits_NV: Tensor, noise: torch.Generator) -> SignalRows:
        logp_NV = logits_NV.float().log_softmax(-1)
        # Among equals the argmax comes first, as everywhere.
        best_N1 = logp_NV.argmax(-1, keepdim=True)
        ids_NK = logp_NV.scatter(-1, best_N1, 1.0).topk(self.k, dim=-1).indices
        others_NV = logp_NV.scatter(-1, ids_NK, float("-inf"))
        logp_NK = logp_NV.gather(-1, ids_NK).clamp(min=NOTHING)
        return SignalRows(ids_NK, logp_NK, others_NV.logsumexp(-1).clamp(min=NOTHING))


class Sampled(Signal):
    """N draws with replacement from p, at temperature 1 and from all of it.

    counts / N is an unbiased estimate of p, so the gradient q - counts / N of the cross-entropy is
    one of q - p (arXiv 2503.16870 finds it as good as the whole of p with N = 50). With p(x) kept
    beside each id, sum_x counts_x / N min(1, q_x / p_x) is an unbiased estimate of the acceptance
    sum_v min(p_v, q_v). Draws depend on `seed`, the example's id and the position alone.

    Bytes a position: m (b + 3) + 1 for m distinct ids of b bytes (2 up to 65,536 ids, else 4).
    """

    def __init__(self, *, draws: int = 50, seed: int = 0) -> None:
        if not 1 <= draws < MOST_ENTRIES:
            raise ValueError(
                f"Sampled(draws={draws}) should draw between 1 and {MOST_ENTRIES - 1} ids of a "
                "position, because counts are kept as one byte; give e.g. draws=50."
            )
        self.draws, self.seed = draws, seed

    @property
    def name(self) -> str:
        return f"sampled{self.draws}" + (f"-s{self.seed}" if self.seed else "")

    @property
    def most(self) -> int:
        return self.draws + 1  # the argmax, which may never be drawn

    def take(self, logits_NV: Tensor, noise: torch.Generator) -> SignalRows:
        p_NV = probabilities(logits_NV, temperature=1.0)
        uniform_NS = torch.rand(len(p_NV), self.draws, generator=noise, dtype=torch.double)
        drawn_NS = draw_many(p_NV, uniform_NS).sort(-1).values
        # Equal neighbours are one entry: the number of the entry of each draw.
        entry_NS = torch.zeros_like(drawn_NS)
        entry_NS[:, 1:] = (drawn_NS[:, 1:] != drawn_NS[:, :-1]).cumsum(-1)
        shape = (len(p_NV), self.draws + 1)
        ids_NK = drawn_NS.new_full(shape, -1).scatter_(-1, entry_NS, drawn_NS)
        counts_NK = drawn_NS.new_zeros(shape).scatter_add_(-1, entry_NS, torch.ones_like(drawn_NS))
        best_N1 = p_NV.argmax(-1, keepdim=True)
        there_N1 = (ids_NK == best_N1).any(-1, keepdim=True)
        ids_NK.scatter_(-1, entry_NS[:, -1:] + 1, torch.where(there_N1, -1, best_N1))
        logp_NK = p_NV.gather(-1, ids_NK.clamp(min=0)).log().masked_fill(ids_NK < 0, NOTHING)
        # Most likely first; among equals the argmax, and nothing behind everything.
        key_NK = logp_NK.masked_fill(ids_NK == best_N1, 1.0).masked_fill(ids_NK < 0, 2 * NOTHING)
        order_NK = key_NK.argsort(dim=-1, descending=True, stable=True)
        used = int((ids_NK >= 0).sum(-1).max()) if len(ids_NK) else 0
        ids_NK, logp_NK, counts_NK = (
            tensor.gather(-1, order_NK)[:, :used] for tensor in (ids_NK, logp_NK, counts_NK)
        )
        return SignalRows(ids_NK, logp_NK, counts_NK=counts_NK)


# --- on disk -------------------------------------------------------------------------------------


def pack(rows: SignalRows, lengths: Sequence[int], vocab_size: int) -> dict[str, Tensor]:
    """The tensors of a shard: `lengths[i]` of these positions are those of its example i.

    `size` [N] entries of each position, `ids`, `logp` and `counts` [E], `tail` [N], and for each
    example (and behind the last) where its positions and its entries begin.
    """
    named_NK = rows.ids_NK >= 0
    size_N = named_NK.sum(-1)
    positions = torch.tensor([0, *lengths]).cumsum(0)
    assert positions[-1] == len(rows)
    packed = {
        "size": size_N.to(torch.uint8),
        "ids": rows.ids_NK[named_NK].to(id_type(vocab_size)),
        "logp": rows.logp_NK[named_NK].half(),
        "positions": positions,
        "entries": torch.cat([size_N.new_zeros(1), size_N.cumsum(0)])[positions],
    }
    if rows.tail_N is not None:
        packed["tail"] = rows.tail_N.half()
    if rows.counts_NK is not None:
        packed["counts"] = rows.counts_NK[named_NK].to(torch.uint8)
    return packed


def unpack(file: Any, example: int) -> SignalRows:
    """The positions of one example of an open shard."""
    first, last = file.get_slice("positions")[example : example + 2].tolist()
    begin, end = file.get_slice("entries")[example : example + 2].tolist()
    size_N = file.get_slice("size")[first:last].long()
    width = int(size_N.max()) if len(size_N) else 0
    named_NK = torch.arange(width) < size_N[:, None]
    names = set(file.keys())

    def spread(name: str, dtype: torch.dtype, filler: float) -> Tensor:
        values_NK = torch.full(named_NK.shape, filler, dtype=dtype)
        values_NK[named_NK] = file.get_slice(name)[begin:end].to(dtype)
        return values_NK

    return SignalRows(
        ids_NK=spread("ids", torch.long, -1),
        logp_NK=spread("logp", torch.float32, NOTHING),
        tail_N=file.get_slice("tail")[first:last].float() if "tail" in names else None,
        counts_NK=spread("counts", torch.long, 0) if "counts" in names else None,
    )


def packed_bytes(rows: SignalRows, vocab_size: int) -> float:
    """Bytes a position, on average over these."""
    packed = pack(rows, [len(rows)], vocab_size)
    total = sum(v.nbytes for name, v in packed.items() if name not in ("positions", "entries"))
    return total / max(1, len(rows))


def id_type(vocab_size: int) -> torch.dtype:
    """The smallest type of integer that holds every id and that safetensors knows."""
    return torch.uint16 if vocab_size <= 2**16 else torch.int32


def teaches(learn_T: Tensor) -> Tensor:
    """The positions u of an example whose token u+1 is one to learn, ascending."""
    return learn_T[1:].nonzero()[:, 0]
