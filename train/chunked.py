"""The vocabulary projection and the loss, chunk by chunk, forward and backward in one go.

With K depths, R counted rows and a vocabulary of D, the plain way keeps K * R * D logits alive for
the backward pass, in several fp32 copies. Here rows are walked in chunks (train/walk.py): project a
chunk, take its loss, differentiate it at once, keep only the gradients of the states and of the
head. Nothing is projected twice, [chunk, D] logits live at a time, and `backward` only scales.

Shape legend: U teacher positions, N rows of one depth, n rows of one block, K depths, D draft
vocabulary, S statistics of a depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from models.drafter.base import Depth
from train.gradients import Gradients
from train.lesson import Lesson, TargetProjection, draft_labels, make_lesson, rows_of
from train.losses import RowLoss, TargetRows
from train.pieces import Piece, Taught, labels_on_top
from train.walk import Walk, rows_per_chunk

__all__ = [
    "Lesson",
    "LossSums",
    "TargetProjection",
    "batch_statistics",
    "chunked_loss",
    "draft_labels",
    "make_lesson",
    "plain_loss",
    "rows_of",
    "rows_per_chunk",
]


@dataclass(frozen=True)
class LossSums:
    """`total` = sum_k lambda^k * loss_K[k] carries the gradient; the rest is for reports.

    `right_K` counts rows whose label is the draft's most likely token, `count_K` the rows.
    """

    total: Tensor
    loss_K: Tensor
    right_K: Tensor
    count_K: Tensor


def chunked_loss(
    *,
    depths: Sequence[Depth],
    lesson: Lesson,
    loss: RowLoss,
    projection: TargetProjection,
    depth_decay: float,
    chunk_rows: int,
    all_ranks: bool = True,
) -> LossSums:
    """sum_k lambda^k sum_rows loss, with [chunk_rows, D] logits of each depth alive.

    `all_ranks`: statistics of the micro-batch (RowLoss.num_statistics) are added up over processes,
    which must then all come here.
    """
    walk = Walk(
        depths=depths, lesson=lesson, loss=loss, projection=projection, chunk_rows=chunk_rows
    )
    tensors = walk.trained() if torch.is_grad_enabled() else []
    statistics_KS = batch_statistics(walk, all_ranks=all_ranks) if loss.num_statistics else None
    weights_K = torch.tensor(
        [depth_decay**k for k in range(len(depths))], device=lesson.index_U.device
    )
    work = _Work(walk, statistics_KS, weights_K, tensors)
    total, loss_K, right_K = _ChunkedLoss.apply(work, *tensors)  # type: ignore[misc]
    return LossSums(total, loss_K, right_K, _counts(walk.taught))


def plain_loss(
    *,
    depths: Sequence[Depth],
    lesson: Lesson,
    loss: RowLoss,
    projection: TargetProjection,
    depth_decay: float,
) -> LossSums:
    """The same by plain autograd, all logits alive: the definition, for tests and comparison."""
    U = len(lesson.index_U)
    target = lesson.taught(projection, 0, U).take(slice(0, U)) if loss.needs_target else None
    every = slice(None)
    all_taught = [Taught.of(depth, lesson, loss) for depth in depths]
    losses, rights = [], []
    for taught in all_taught:
        logits_ND = taught.logits(every)
        own = None if target is None else target.take(taught.teacher_N)
        given: dict[str, Any] = {}
        if loss.needs_features:
            given["feature_nd"] = taught.features(every)
        with torch.autocast(logits_ND.device.type, enabled=False):
            rows = taught.given(logits_ND, every, lesson, own, **given)
            if loss.num_statistics:
                with torch.no_grad():
                    given["statistics_S"] = loss.statistics(rows)
                rows = taught.given(logits_ND, every, lesson, own, **given)
            losses.append(taught.weighted(loss(rows), every).sum())
        rights.append(labels_on_top(rows))
    loss_K = torch.stack(losses)
    total = sum(depth_decay**k * loss_K[k] for k in range(len(depths)))
    return LossSums(
        torch.as_tensor(total), loss_K.detach(), torch.stack(rights), _counts(all_taught)
    )


def _counts(all_taught: Sequence[Taught]) -> Tensor:
    device = all_taught[0].state_N.device
    return torch.tensor([len(t.state_N) for t in all_taught], dtype=torch.float32, device=device)


@torch.no_grad()
def batch_statistics(walk: Walk, *, all_ranks: bool) -> Tensor:
    """The sums `[K, S]` a loss asked for: one walk without gradients, then over the processes."""
    device = walk.lesson.index_U.device
    sums_KS = torch.zeros(len(walk.taught), walk.loss.num_statistics, device=device)
    for piece, rows_n, target in walk.look():
        with torch.autocast(device.type, enabled=False):
            rows = piece.taught.given(piece.leaf(rows_n), rows_n, walk.lesson, target)
            sums_KS[piece.k] += walk.loss.statistics(rows)
    if all_ranks and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums_KS)
    return sums_KS


@dataclass(frozen=True)
class _Work:
    """Everything the function below needs beside the tensors that get gradients."""

    walk: Walk
    statistics_KS: Tensor | None
    weights_K: Tensor
    tensors: Sequence[Tensor]


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken inside `forward`, chunk by chunk; `backward` scales them."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        walk = work.walk
        gradients = Gradients(work.tensors)
        loss_K = torch.zeros_like(work.weights_K)
        right_K = torch.zeros_like(loss_K)
        for pieces, start, stop in walk.chunks():
            products = walk.project(pieces, differentiate=bool(tensors))
            for piece, rows_n, target in walk.blocks(pieces, start, stop):
                with torch.autocast(loss_K.device.type, enabled=False):
                    summed, right = _block(work, gradients, piece, rows_n, target)
                loss_K[piece.k] += summed
                right_K[piece.k] += right
            for product in products:
                product.backward(gradients)
        ctx.grads = [gradients.of[id(t)] for t in work.tensors] if tensors else None
        ctx.mark_non_differentiable(loss_K, right_K)
        return (work.weights_K * loss_K).sum(), loss_K, right_K

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        assert ctx.grads is not None, "the loss was computed without gradients, or used twice"
        grads, ctx.grads = ctx.grads, None
        return (None, *(g.mul_(outer[0]) for g in grads))


def _block(
    work: _Work, gradients: Gradients, piece: Piece, rows_n: slice, target: TargetRows | None
) -> tuple[Tensor, Tensor]:
    """Loss and right labels of some rows; their gradients go where the piece keeps them."""
    walk, taught = work.walk, piece.taught
    differentiate = bool(work.tensors)
    with torch.set_grad_enabled(differentiate):
        logits_nD = piece.leaf(rows_n).requires_grad_(differentiate)
        feature_nd = None
        if walk.loss.needs_features:
            feature_nd = taught.features(rows_n).detach()
            feature_nd.requires_grad_(gradients.wants(taught.depth.feature_BNd))
        rows = taught.given(
            logits_nD,
            rows_n,
            walk.lesson,
            target,
            feature_nd=feature_nd,
            statistics_S=None if work.statistics_KS is None else work.statistics_KS[piece.k],
        )
        summed = taught.weighted(walk.loss(rows), rows_n).sum()
    right = labels_on_top(rows)
    if differentiate and summed.requires_grad:
        inputs = [logits_nD] if feature_nd is None else [logits_nD, feature_nd]
        inputs = [t for t in inputs if t.requires_grad]
        weight = work.weights_K[piece.k]
        dz_nD, *rest = torch.autograd.grad(summed, inputs, weight, allow_unused=True)
        piece.set_dz(rows_n, dz_nD)
        if rest and rest[0] is not None:
            feature_BNd = taught.depth.feature_BNd
            assert feature_BNd is not None
            gradients.add_rows(feature_BNd, taught.state_N[rows_n], rest[0])
    elif differentiate:
        piece.set_dz(rows_n, None)
    return summed.detach(), right
