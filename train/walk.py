"""The rows of a micro-batch, projected chunk by chunk and differentiated block by block.

Two sizes. A *chunk* is a few hundred rows: enough for fast matrix products; its logits stay in the
dtype they are computed in. A *block* is a part of a chunk small enough for a cache: there the
arithmetic of the loss runs in fp32, by autograd on a leaf, and its gradient overwrites the logits.

    chunk   logits = h W^T                   for every depth, and once for the target
    block     dz = d loss / d logits         fp32 inside, written over the logits
    chunk   dh = dz W,  dW += dz^T h         or autograd, for heads that are no plain matrix

All depths of a chunk are open at once, so that p of a block is made once and not once a depth.

Shape legend: N rows of one depth, n rows of one chunk or block, U teacher positions, K depths,
d hidden size, D draft vocabulary, S uniform numbers of a row or statistics of a depth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.drafter.base import Depth
from train.gradients import Gradients
from train.lesson import Lesson, TargetProjection, rows_of
from train.losses import RowLoss, Rows, TargetRows

LIVE_LOGITS = {"cpu": 2**27, "cuda": 2**29}
"""Logits of one chunk, all depths and the target's: 268 MB in bf16, 1 GB on an accelerator."""

MOST_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows of a chunk beyond which matrix products get no faster."""

BLOCK_LOGITS = {"cpu": 2**19, "cuda": 2**24}
"""fp32 logits of one block, about; the loss makes some ten tensors of this size."""


def rows_per_chunk(vocab_size: int, depths: int = 1, device: str = "cpu") -> int:
    """Rows that keep a chunk's memory bounded and its matrix products large."""
    kind = device if device in LIVE_LOGITS else "cuda"
    return max(64, min(MOST_ROWS[kind], LIVE_LOGITS[kind] // (vocab_size * (depths + 1))))


@dataclass(frozen=True)
class Taught:
    """One depth, the rows of it that count, and what its loss was given to draw with.

    `narrow_BNd` is what the head's matrix multiplies: the states, or fewer numbers made of them.
    That step is left to autograd: it is small, and outside of the walk.
    """

    depth: Depth
    narrow_BNd: Tensor
    state_N: Tensor
    teacher_N: Tensor
    uniform_NS: Tensor | None

    @staticmethod
    def of(depth: Depth, lesson: Lesson, loss: RowLoss) -> "Taught":
        if loss.needs_features and depth.feature_BNd is None:
            raise ValueError(
                "The loss compares predicted features with the target's, but this drafter predicts "
                "none (its depths have no feature_BNd); choose a loss without SmoothL1, or a "
                "drafter that predicts features."
            )
        state_N, teacher_N = rows_of(depth, lesson)
        uniform_NS = None
        if loss.num_draws:
            uniform_NS = torch.rand(len(state_N), loss.num_draws, device=state_N.device)
        return Taught(depth, depth.head.narrow(depth.states_BNd), state_N, teacher_N, uniform_NS)

    def given(
        self,
        logits_nD: Tensor,
        rows_n: slice,
        lesson: Lesson,
        target: TargetRows | None,
        *,
        feature_nd: Tensor | None = None,
        statistics_S: Tensor | None = None,
    ) -> Rows:
        """What a loss may look at in some of the rows. Its arithmetic is fp32 from here on."""
        teacher_n = self.teacher_N[rows_n]
        return Rows(
            logq_ND=F.log_softmax(logits_nD, dim=-1, dtype=torch.float32),
            label_N=lesson.label_U[teacher_n],
            target=target,
            feature_Nd=None if feature_nd is None else feature_nd.float(),
            target_feature_Nd=None if feature_nd is None else lesson.final_Ud[teacher_n],
            uniform_NS=None if self.uniform_NS is None else self.uniform_NS[rows_n],
            statistics_S=statistics_S,
        )

    def logits(self, rows_n: slice) -> Tensor:
        """Draft logits of some rows, as the head itself makes them."""
        return self.depth.head(self.depth.states_BNd.flatten(0, 1)[self.state_N[rows_n]])

    def features(self, rows_n: slice) -> Tensor:
        """The features predicted beside the states of some rows."""
        assert self.depth.feature_BNd is not None
        return self.depth.feature_BNd.flatten(0, 1)[self.state_N[rows_n]]

    def weighted(self, loss_n: Tensor, rows_n: slice) -> Tensor:
        """Losses times the depth's own weights of its states."""
        if self.depth.weight_BN is None:
            return loss_n
        return loss_n * self.depth.weight_BN.detach().flatten()[self.state_N[rows_n]]


@torch.no_grad()
def labels_on_top(rows: Rows) -> Tensor:
    """How many labels are the draft's most likely token."""
    label_logq_N = rows.logq_ND.gather(-1, rows.label_N.clamp(min=0)[:, None])[:, 0]
    best_N = label_logq_N >= rows.logq_ND.amax(-1)
    return (best_N & (rows.label_N >= 0)).sum().float()


class Piece:
    """Some rows of one depth: projected at once, then differentiated at once."""

    def __init__(
        self, k: int, taught: Taught, rows: slice, matrix: tuple[Tensor, Tensor | None] | None
    ) -> None:
        self.k, self.taught, self.rows, self.matrix = k, taught, rows, matrix
        self.depth = taught.depth
        self.state_n = taught.state_N[rows]

    def project(self, cast: dict[int, Tensor], *, differentiate: bool) -> None:
        """Logits, and a place for their gradient: over the logits where nothing else needs them."""
        states = self.taught.narrow_BNd
        h_nd = states.detach().flatten(0, 1)[self.state_n]
        device = h_nd.device.type
        enabled = torch.is_autocast_enabled(device)
        if self.matrix is None:
            h_nd.requires_grad_(differentiate and states.requires_grad)
            # Autocast must not keep weights that it has cast without gradients for the next walk.
            autocast = torch.autocast(
                device, dtype=torch.get_autocast_dtype(device), enabled=enabled, cache_enabled=False
            )
            with torch.set_grad_enabled(differentiate), autocast:
                self.made_nD = self.depth.head(h_nd)
            self.logits_nD = self.made_nD.detach()
            self.dz_nD = torch.empty_like(self.logits_nD) if differentiate else self.logits_nD
        else:
            dtype = torch.get_autocast_dtype(device) if enabled else h_nd.dtype
            h_nd = h_nd.to(dtype)
            for tensor in self.matrix:
                if tensor is not None and id(tensor) not in cast:
                    cast[id(tensor)] = tensor.detach().to(dtype)
            weight_Dd, bias_D = self.matrix
            self.weight_Dd = cast[id(weight_Dd)]
            with torch.autocast(device, enabled=False):
                bias = None if bias_D is None else cast[id(bias_D)]
                self.logits_nD = F.linear(h_nd, self.weight_Dd, bias)
            self.dz_nD = self.logits_nD
        self.h_nd = h_nd

    def _inside(self, rows_n: slice) -> slice:
        return slice(rows_n.start - self.rows.start, rows_n.stop - self.rows.start)

    def leaf(self, rows_n: slice) -> Tensor:
        """Logits of some rows, cut off from how they were made."""
        return self.logits_nD[self._inside(rows_n)].detach()

    def set_dz(self, rows_n: slice, dz_nD: Tensor | None) -> None:
        """The gradient of those logits; None where the loss does not read them."""
        if dz_nD is None:
            self.dz_nD[self._inside(rows_n)] = 0.0
        else:
            self.dz_nD[self._inside(rows_n)] = dz_nD

    def backward(self, gradients: Gradients) -> None:
        """From the gradient of the logits to those of the states and the head."""
        states = self.taught.narrow_BNd
        if self.matrix is None:
            own = [p for p in self.depth.head.parameters() if gradients.wants(p)]
            inputs = [*own, *([self.h_nd] if self.h_nd.requires_grad else [])]
            if not inputs:
                return
            grads = torch.autograd.grad(self.made_nD, inputs, self.dz_nD, allow_unused=True)
            for p, grad in zip(own, grads, strict=False):
                if grad is not None:
                    gradients.add(p, grad)
            if self.h_nd.requires_grad and grads[-1] is not None:
                gradients.add_rows(states, self.state_n, grads[-1])
            return
        weight, bias = self.matrix
        if gradients.wants(states):
            gradients.add_rows(states, self.state_n, self.dz_nD @ self.weight_Dd)
        if gradients.wants(weight):
            gradients.add_product(weight, self.dz_nD, self.h_nd)
        if bias is not None and gradients.wants(bias):
            gradients.add(bias, self.dz_nD.sum(0, dtype=torch.float32))


class Walk:
    """Chunks of a lesson's teacher positions, with the rows of every depth that they teach."""

    def __init__(
        self,
        *,
        depths: Sequence[Depth],
        lesson: Lesson,
        loss: RowLoss,
        projection: TargetProjection,
        chunk_rows: int,
    ) -> None:
        self.lesson, self.loss, self.projection = lesson, loss, projection
        self.chunk_rows = chunk_rows
        by_head = {id(depth.head): depth.head.matrix() for depth in depths}
        self.matrices = [by_head[id(depth.head)] for depth in depths]
        self.taught = [Taught.of(depth, lesson, loss) for depth in depths]
        self.cast: dict[int, Tensor] = {}

    def trained(self) -> list[Tensor]:
        """Every tensor that may get a gradient, each once."""
        tensors: list[Tensor] = []
        for taught, matrix in zip(self.taught, self.matrices, strict=True):
            depth = taught.depth
            tensors.append(taught.narrow_BNd)
            if self.loss.needs_features:
                assert depth.feature_BNd is not None
                tensors.append(depth.feature_BNd)
            if matrix is None:
                tensors += depth.head.parameters()
            else:
                tensors += [t for t in matrix if t is not None]
        return list({id(t): t for t in tensors if t.requires_grad}.values())

    def chunks(self) -> Iterator[tuple[list[Piece], int, int]]:
        """Pieces of all depths taught at the teacher positions [start, stop), at most one a depth.

        Sampled positions can be taught by one teacher position more than once: a chunk with more
        rows of a depth than usual comes in several parts.
        """
        U = len(self.lesson.index_U)
        for start in range(0, U, self.chunk_rows):
            stop = min(start + self.chunk_rows, U)
            parts: list[list[Piece]] = []
            for k, taught in enumerate(self.taught):
                first, last = self.find(taught, [start, stop])
                for part, i in enumerate(range(first, last, self.chunk_rows)):
                    rows = slice(i, min(i + self.chunk_rows, last))
                    if part == len(parts):
                        parts.append([])
                    parts[part].append(Piece(k, taught, rows, self.matrices[k]))
            for pieces in parts:
                yield pieces, start, stop

    def blocks(
        self, pieces: Sequence[Piece], start: int, stop: int
    ) -> Iterator[tuple[Piece, slice, TargetRows | None]]:
        """Parts of projected pieces, as rows of their depth, with p where the loss needs it."""
        needs = self.loss.needs_target
        logits = self.lesson.taught(self.projection, start, stop) if needs else None
        D = pieces[0].logits_nD.shape[-1]
        size = max(1, BLOCK_LOGITS.get(self.lesson.index_U.device.type, 2**24) // D)
        edges = [*range(start, stop, size), stop]
        ends = [self.find(piece.taught, edges) for piece in pieces]
        for b in range(len(edges) - 1):
            target = None
            if logits is not None:
                target = logits.take(slice(edges[b] - start, edges[b + 1] - start))
            for piece, end in zip(pieces, ends, strict=True):
                first, last = max(end[b], piece.rows.start), min(end[b + 1], piece.rows.stop)
                for i in range(first, last, size):
                    rows = slice(i, min(i + size, last))
                    own = target
                    # In order and all of them: nothing to pick.
                    complete = piece.depth.positions_BN is None and last - first == (
                        edges[b + 1] - edges[b]
                    )
                    if target is not None and not complete:
                        own = target.take(piece.taught.teacher_N[rows] - edges[b])
                    yield piece, rows, own

    @torch.no_grad()
    def look(self) -> Iterator[tuple[Piece, slice, TargetRows | None]]:
        """All blocks, projected, without any gradient."""
        for pieces, start, stop in self.chunks():
            for piece in pieces:
                piece.project(self.cast, differentiate=False)
            yield from self.blocks(pieces, start, stop)

    @staticmethod
    def find(taught: Taught, positions: list[int]) -> list[int]:
        """The first row taught at or behind each of some teacher positions."""
        at = torch.tensor(positions, device=taught.teacher_N.device)
        return torch.searchsorted(taught.teacher_N, at).tolist()
