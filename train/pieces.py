"""Rows of a micro-batch that are taught, and their way through the vocabulary head and back.

Shape legend: N rows of one depth, n rows of one chunk or block, d hidden size, D draft vocabulary,
S uniform numbers of a row or statistics of a depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.autocast import in_autocast
from models.drafter.base import Depth
from train.gradients import Gradients
from train.lesson import Lesson, rows_of
from train.losses import RowLoss, Rows, TargetRows


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
    """Some rows of one depth, and where the gradient of their logits goes."""

    logits_nD: Tensor
    dz_nD: Tensor

    def __init__(self, k: int, taught: Taught, rows: slice) -> None:
        self.k, self.taught, self.rows = k, taught, rows
        self.state_n = taught.state_N[rows]

    def states(self) -> Tensor:
        """What the head's matrix multiplies, cut off from how it was made."""
        return self.taught.narrow_BNd.detach().flatten(0, 1)[self.state_n]

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


class MatrixProduct:
    """Pieces whose heads are one plain matrix: one product for all, and so for its gradient.

    The gradient of the logits is written over them.
    """

    def __init__(self, pieces: Sequence[Piece], matrix: tuple[Tensor, Tensor | None]) -> None:
        self.pieces, self.matrix = pieces, matrix

    def project(self, cast: dict[int, Tensor], *, differentiate: bool) -> None:
        """Logits; `cast` keeps the matrix in the dtype of products from one chunk to the next."""
        self.h_nd = torch.cat([in_autocast(piece.states()) for piece in self.pieces])
        for tensor in self.matrix:
            if tensor is not None and id(tensor) not in cast:
                cast[id(tensor)] = tensor.detach().to(self.h_nd.dtype)
        weight_Dd, bias_D = self.matrix
        self.weight_Dd = cast[id(weight_Dd)]
        with torch.autocast(self.h_nd.device.type, enabled=False):
            bias = None if bias_D is None else cast[id(bias_D)]
            self.logits_nD = F.linear(self.h_nd, self.weight_Dd, bias)
        for piece, logits_nD in zip(self.pieces, self._parts(self.logits_nD), strict=True):
            piece.logits_nD = piece.dz_nD = logits_nD

    def backward(self, gradients: Gradients) -> None:
        """From the gradient of the logits to those of the states and the head."""
        weight, bias = self.matrix
        dz_nD = self.logits_nD
        if any(gradients.wants(piece.taught.narrow_BNd) for piece in self.pieces):
            parts = self._parts(dz_nD @ self.weight_Dd)
            for piece, dh_nd in zip(self.pieces, parts, strict=True):
                if gradients.wants(piece.taught.narrow_BNd):
                    gradients.add_rows(piece.taught.narrow_BNd, piece.state_n, dh_nd)
        if gradients.wants(weight):
            gradients.add_product(weight, dz_nD, self.h_nd)
        if bias is not None and gradients.wants(bias):
            gradients.add(bias, dz_nD.sum(0, dtype=torch.float32))

    def _parts(self, of_all: Tensor) -> Sequence[Tensor]:
        return of_all.split([len(piece.state_n) for piece in self.pieces])


class OwnForward:
    """A piece whose head is more than a matrix: differentiated by autograd."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def project(self, cast: dict[int, Tensor], *, differentiate: bool) -> None:
        """Logits, as the head itself makes them, and room for their gradient."""
        piece = self.piece
        h_nd = piece.states()
        device = h_nd.device.type
        h_nd.requires_grad_(differentiate and piece.taught.narrow_BNd.requires_grad)
        # Autocast must not keep weights that it has cast without gradients for the next walk.
        autocast = torch.autocast(
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        with torch.set_grad_enabled(differentiate), autocast:
            self.made_nD = piece.taught.depth.head(h_nd)
        self.h_nd = h_nd
        piece.logits_nD = self.made_nD.detach()
        piece.dz_nD = torch.empty_like(piece.logits_nD) if differentiate else piece.logits_nD

    def backward(self, gradients: Gradients) -> None:
        """From the gradient of the logits to those of the states and the head's parameters."""
        piece = self.piece
        own = [p for p in piece.taught.depth.head.parameters() if gradients.wants(p)]
        inputs = [*own, *([self.h_nd] if self.h_nd.requires_grad else [])]
        if not inputs:
            return
        grads = torch.autograd.grad(self.made_nD, inputs, piece.dz_nD, allow_unused=True)
        for p, grad in zip(own, grads, strict=False):
            if grad is not None:
                gradients.add(p, grad)
        if self.h_nd.requires_grad and grads[-1] is not None:
            gradients.add_rows(piece.taught.narrow_BNd, piece.state_n, grads[-1])
