"""The vocabulary projection and the loss, chunk by chunk, forward and backward in one go.

With K depths, R counted rows and a vocabulary of D, the plain way keeps K * R * D logits alive for
the backward pass. Here rows are walked in chunks: project a chunk, take its loss, differentiate it
at once, keep only the gradients of the states and of the head. Nothing is computed twice, at most
[chunk, D] draft logits live, and `backward` only scales.

All depths share one list of *teacher positions*: position u with its distribution p_u and its label
x_{u+1}. It counts iff x_{u+1} exists and is a token to learn, u+1 < T and learn[u+1]. A depth of
shift s is taught there by its state at index t = u - s, if t >= 0: that is the mask rule of
models/drafter/base.py (t counts iff t+s+1 < T and learn[t+s+1]) read from the teacher's side.
Chunks run over teacher positions, all depths inside, so that p is projected once and not K times.

Shape legend: B sequences, T positions, U teacher positions, N rows of one depth, M = B*T flat
states, n rows of one chunk, K depths, d hidden size, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.drafter.base import Depth
from train.losses import RowLoss, Rows, TargetRows

LIVE_LOGITS = 2**24
"""Draft logits of one chunk, about; each costs some 14 bytes (bf16, two fp32 copies, gradient)."""

Piece = tuple[Tensor, Tensor]
"""Rows of one depth in one chunk: indices of its flat states, and their indices in the chunk."""


def rows_per_chunk(vocab_size: int) -> int:
    """Rows that keep a chunk's memory bounded and its matrix products large."""
    return max(128, min(1024, LIVE_LOGITS // vocab_size))


class TargetProjection(Protocol):
    """Turns final features into log p over the draft vocabulary (see train/teacher.py)."""

    def rows(self, final_nd: Tensor, logz_n: Tensor | None) -> TargetRows: ...


@dataclass(frozen=True)
class Lesson:
    """The teacher positions of a batch: where, what the target computed there, what came next.

    `index_U` is b*T + u, ascending; `label_U` is a draft-vocabulary index, -1 when outside.
    """

    shape: tuple[int, int]
    index_U: Tensor
    label_U: Tensor
    final_Ud: Tensor
    logz_U: Tensor | None


@dataclass(frozen=True)
class LossSums:
    """`total` = sum_k lambda^k * loss_K[k] carries the gradient; the rest is for reports.

    `right_K` counts rows whose label is the draft's most likely token, `count_K` the rows.
    """

    total: Tensor
    loss_K: Tensor
    right_K: Tensor
    count_K: Tensor


def draft_labels(tokens: Tensor, draft_ids_D: Tensor | None, vocab_size: int) -> Tensor:
    """Target ids -> draft-vocabulary indices, -1 for ids that cannot be drafted."""
    if draft_ids_D is None:
        return tokens
    inverse_V = torch.full((vocab_size,), -1, dtype=torch.long, device=draft_ids_D.device)
    inverse_V[draft_ids_D] = torch.arange(len(draft_ids_D), device=draft_ids_D.device)
    return inverse_V[tokens]


def make_lesson(
    *,
    tokens_BT: Tensor,
    learn_BT: Tensor,
    final_BTd: Tensor,
    logz_BT: Tensor | None,
    draft_ids_D: Tensor | None,
    vocab_size: int,
) -> Lesson:
    """Pick the positions u whose next token x_{u+1} is to be learned."""
    B, T = tokens_BT.shape
    counts_BT = torch.zeros_like(learn_BT, dtype=torch.bool)
    counts_BT[:, :-1] = learn_BT[:, 1:]
    index_U = counts_BT.flatten().nonzero()[:, 0]
    # index_U never points at the last position of a sequence, so + 1 stays in the same one.
    label_U = draft_labels(tokens_BT.flatten()[index_U + 1], draft_ids_D, vocab_size)
    return Lesson(
        shape=(B, T),
        index_U=index_U,
        label_U=label_U,
        final_Ud=final_BTd.flatten(0, 1)[index_U],
        logz_U=None if logz_BT is None else logz_BT.flatten()[index_U],
    )


def rows_of(depth: Depth, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """The rows of one depth that count: `(state_N, teacher_N)`, ascending in `teacher_N`.

    `state_N` indexes the depth's states flattened over batch and position, `teacher_N` the lesson.
    """
    B, T = lesson.shape
    device = lesson.index_U.device
    if depth.positions_BN is None:
        t_U = lesson.index_U % T - depth.shift
        teacher_N = (t_U >= 0).nonzero()[:, 0]
        state_N = lesson.index_U[teacher_N] - depth.shift
    else:
        where_M = torch.full((B * T,), -1, dtype=torch.long, device=device)
        where_M[lesson.index_U] = torch.arange(len(lesson.index_U), device=device)
        u_BN = depth.positions_BN + depth.shift
        start_B1 = torch.arange(B, device=device)[:, None] * T
        found_N = torch.where(u_BN < T, where_M[start_B1 + u_BN.clamp(max=T - 1)], -1).flatten()
        state_N = (found_N >= 0).nonzero()[:, 0]
        order_N = found_N[state_N].argsort(stable=True)
        state_N = state_N[order_N]
        teacher_N = found_N[state_N]
    if depth.mask_BN is not None:
        keep_N = depth.mask_BN.flatten()[state_N]
        state_N, teacher_N = state_N[keep_N], teacher_N[keep_N]
    return state_N, teacher_N


def chunked_loss(
    *,
    depths: Sequence[Depth],
    lesson: Lesson,
    loss: RowLoss,
    projection: TargetProjection,
    depth_decay: float,
    chunk_rows: int,
) -> LossSums:
    """sum_k lambda^k sum_rows loss, with at most [chunk_rows, D] draft logits alive."""
    parameters: dict[int, Tensor] = {}
    for depth in depths:
        parameters |= {id(p): p for p in depth.head.parameters() if p.requires_grad}
    tensors = [depth.states_BNd for depth in depths] + list(parameters.values())
    work = _Work(
        depths=depths,
        rows=[rows_of(depth, lesson) for depth in depths],
        lesson=lesson,
        loss=loss,
        projection=projection,
        weights=[depth_decay**k for k in range(len(depths))],
        chunk_rows=chunk_rows,
        differentiate=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
    )
    total, loss_K, right_K = _ChunkedLoss.apply(work, *tensors)  # type: ignore[misc]
    count_K = torch.tensor([len(s) for s, _ in work.rows], dtype=torch.float32)
    return LossSums(total, loss_K, right_K, count_K.to(loss_K.device))


def plain_loss(
    *,
    depths: Sequence[Depth],
    lesson: Lesson,
    loss: RowLoss,
    projection: TargetProjection,
    depth_decay: float,
) -> LossSums:
    """The same by plain autograd, all logits alive: the definition, for tests and comparison."""
    target = projection.rows(lesson.final_Ud, lesson.logz_U) if loss.needs_target else None
    losses, rights, counts = [], [], []
    for depth in depths:
        state_N, teacher_N = rows_of(depth, lesson)
        logits_ND = depth.head(depth.states_BNd.flatten(0, 1)[state_N])
        loss_N, right = _row_losses(
            logits_ND,
            lesson.label_U[teacher_N],
            None if target is None else target.take(teacher_N),
            loss,
            _weights_of(depth, state_N),
        )
        losses.append(loss_N.sum())
        rights.append(right)
        counts.append(torch.tensor(float(len(state_N))))
    loss_K = torch.stack(losses)
    total = sum(depth_decay**k * loss_K[k] for k in range(len(depths)))
    return LossSums(
        torch.as_tensor(total), loss_K.detach(), torch.stack(rights), torch.stack(counts)
    )


def _weights_of(depth: Depth, state_N: Tensor) -> Tensor | None:
    """The depth's own weights of some of its states."""
    return None if depth.weight_BN is None else depth.weight_BN.detach().flatten()[state_N]


def _row_losses(
    logits_nD: Tensor,
    label_n: Tensor,
    target: TargetRows | None,
    loss: RowLoss,
    weight_n: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted losses `[n]` of some rows; how many labels are the draft's most likely token."""
    # Loss arithmetic is fp32 whatever the projection ran in.
    with torch.autocast(logits_nD.device.type, enabled=False):
        logq_nD = F.log_softmax(logits_nD, dim=-1, dtype=torch.float32)
        loss_n = loss(Rows(logq_nD, label_n, target))
        if weight_n is not None:
            loss_n = loss_n * weight_n
        with torch.no_grad():
            label_logq_n1 = logq_nD.gather(-1, label_n.clamp(min=0)[:, None])
            best_n = label_logq_n1[:, 0] >= logq_nD.amax(-1)
            right = (best_n & (label_n >= 0)).sum().float()
    return loss_n, right


@dataclass(frozen=True)
class _Work:
    """Everything the walk needs beside the tensors that get gradients."""

    depths: Sequence[Depth]
    rows: Sequence[tuple[Tensor, Tensor]]
    lesson: Lesson
    loss: RowLoss
    projection: TargetProjection
    weights: Sequence[float]
    chunk_rows: int
    differentiate: bool

    def pieces(self, k: int, start: int, stop: int) -> list[Piece]:
        """Rows of depth k taught at teacher positions [start, stop), in pieces of chunk size."""
        state_N, teacher_N = self.rows[k]
        ends = torch.tensor([start, stop], device=teacher_N.device)
        first, last = torch.searchsorted(teacher_N, ends).tolist()
        return [
            (state_N[i:j], teacher_N[i:j] - start)
            for i in range(first, last, self.chunk_rows)
            for j in [min(i + self.chunk_rows, last)]
        ]


def _is_all(index_n: Tensor, size: int) -> bool:
    """True when taking these ascending rows of `size` rows would change nothing."""
    return len(index_n) == size and bool((index_n.diff() == 1).all())


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken inside `forward`, chunk by chunk; `backward` scales them."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        K = len(work.depths)
        states, parameters = tensors[:K], tensors[K:]
        grad_states = [
            torch.zeros(s.shape, dtype=s.dtype, device=s.device) if s.requires_grad else None
            for s in states
        ]
        # fp32 sums whatever the parameters' dtype: many small chunks are added up. The first
        # chunk's gradient becomes the sum.
        grad_parameters: list[Tensor | None] = [None] * len(parameters)
        slot = {id(p): i for i, p in enumerate(parameters)}
        loss_K = torch.zeros(K, dtype=torch.float32, device=states[0].device)
        right_K = torch.zeros_like(loss_K)
        lesson = work.lesson
        for start in range(0, len(lesson.index_U), work.chunk_rows):
            stop = min(start + work.chunk_rows, len(lesson.index_U))
            target = None
            if work.loss.needs_target:
                logz_n = None if lesson.logz_U is None else lesson.logz_U[start:stop]
                target = work.projection.rows(lesson.final_Ud[start:stop], logz_n)
            for k, depth in enumerate(work.depths):
                own = [p for p in depth.head.parameters() if p.requires_grad]
                for state_n, teacher_n in work.pieces(k, start, stop):
                    chunk_nd = states[k].detach().flatten(0, 1)[state_n]
                    taught = target
                    if target is not None and not _is_all(teacher_n, stop - start):
                        taught = target.take(teacher_n)
                    with torch.set_grad_enabled(work.differentiate):
                        chunk_nd.requires_grad_(grad_states[k] is not None and work.differentiate)
                        loss_n, right = _row_losses(
                            depth.head(chunk_nd),
                            lesson.label_U[start:stop][teacher_n],
                            taught,
                            work.loss,
                            _weights_of(depth, state_n),
                        )
                        summed = loss_n.sum()
                    loss_K[k] += summed.detach()
                    right_K[k] += right
                    inputs = [*own, *([chunk_nd] if chunk_nd.requires_grad else [])]
                    if not work.differentiate or not inputs:
                        continue
                    with torch.autocast(summed.device.type, enabled=False):
                        weight = torch.full_like(summed, work.weights[k])
                        grads = torch.autograd.grad(summed, inputs, weight, allow_unused=True)
                    for p, grad in zip(own, grads, strict=False):
                        if grad is not None:
                            earlier = grad_parameters[slot[id(p)]]
                            added = grad.float() if earlier is None else earlier.add_(grad)
                            grad_parameters[slot[id(p)]] = added
                    grad_state = grad_states[k]
                    if grad_state is not None:
                        flat_Md = grad_state.view(-1, grad_state.shape[-1])
                        flat_Md[state_n] = grads[-1].to(flat_Md.dtype)
        ctx.grads = None
        if work.differentiate:
            cast = [
                None if g is None else g.to(p.dtype)
                for g, p in zip(grad_parameters, parameters, strict=True)
            ]
            ctx.grads = [*grad_states, *cast]
        weights_K = torch.tensor(work.weights, device=loss_K.device)
        ctx.mark_non_differentiable(loss_K, right_K)
        return (weights_K * loss_K).sum(), loss_K, right_K

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        assert ctx.grads is not None, "the loss was computed without gradients, or used twice"
        grads, ctx.grads = ctx.grads, None
        return (None, *(None if g is None else g.mul_(outer[0]) for g in grads))
