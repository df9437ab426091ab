"""The rows of a micro-batch, projected chunk by chunk and differentiated block by block.

Two sizes. A *chunk* is a few hundred rows: enough for fast matrix products; its logits stay in the
dtype they are computed in. A *block* is a part of a chunk small enough for a cache: there the
arithmetic of the loss runs in fp32, by autograd on a leaf, and its gradient overwrites the logits.

    chunk   logits = h W^T                   for every depth, and once for the target
    block     dz = d loss / d logits         fp32 inside, written over the logits
    chunk   dh = dz W,  dW += dz^T h         or autograd, for heads that are no plain matrix

All depths of a chunk are open at once, so that p of a block is made once and not once a depth.

Shape legend: N rows of one depth, n rows of one chunk or block, U teacher positions, K depths,
D draft vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.drafter.base import Depth
from train.lesson import Lesson, TargetProjection
from train.losses import RowLoss, TargetRows
from train.pieces import MatrixProduct, OwnForward, Piece, Taught

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
                    parts[part].append(Piece(k, taught, rows))
            for pieces in parts:
                yield pieces, start, stop

    def project(
        self, pieces: Sequence[Piece], *, differentiate: bool
    ) -> list[MatrixProduct | OwnForward]:
        """Give every piece its logits; what comes back takes their gradients on."""
        shared: dict[int, tuple[tuple[Tensor, Tensor | None], list[Piece]]] = {}
        products: list[MatrixProduct | OwnForward] = []
        for piece in pieces:
            matrix = self.matrices[piece.k]
            if matrix is None:
                products.append(OwnForward(piece))
            else:
                shared.setdefault(id(matrix), (matrix, []))[1].append(piece)
        products += [MatrixProduct(some, matrix) for matrix, some in shared.values()]
        for product in products:
            product.project(self.cast, differentiate=differentiate)
        return products

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
                    complete = piece.taught.depth.positions_BN is None and last - first == (
                        edges[b + 1] - edges[b]
                    )
                    if target is not None and not complete:
                        own = target.take(piece.taught.teacher_N[rows] - edges[b])
                    yield piece, rows, own

    @torch.no_grad()
    def look(self) -> Iterator[tuple[Piece, slice, TargetRows | None]]:
        """All blocks, projected, without any gradient."""
        for pieces, start, stop in self.chunks():
            self.project(pieces, differentiate=False)
            yield from self.blocks(pieces, start, stop)

    @staticmethod
    def find(taught: Taught, positions: list[int]) -> list[int]:
        """The first row taught at or behind each of some teacher positions."""
        at = torch.tensor(positions, device=taught.teacher_N.device)
        return torch.searchsorted(taught.teacher_N, at).tolist()
