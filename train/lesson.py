"""What a batch teaches: the positions whose next token is to be learned.

All depths share one list of *teacher positions*: position u with its distribution p_u and its label
x_{u+1}. It counts iff x_{u+1} exists and is a token to learn, u+1 < T and learn[u+1]. A depth of
shift s is taught there by its state at index t = u - s, if t >= 0: that is the mask rule of
models/drafter/base.py (t counts iff t+s+1 < T and learn[t+s+1]) read from the teacher's side.

Shape legend: B sequences, T positions, U teacher positions, N rows of one depth, M = B*T flat
states, K depths, d hidden size, D draft vocabulary, V target vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.drafter.base import Depth
from train.losses import TargetLogits, TargetRows


class TargetProjection(Protocol):
    """Turns final features into log p over the draft vocabulary (see train/teacher.py)."""

    def rows(self, final_nd: Tensor, logz_n: Tensor | None) -> TargetRows | TargetLogits: ...


@dataclass(frozen=True)
class Lesson:
    """The teacher positions of a batch: where, what the target computed there, what came next.

    `index_U` is b*T + u, ascending; `label_U` is a draft-vocabulary index, -1 when outside.
    `target` holds log p where it was stored (a few tokens and a tail) and need not be projected.
    """

    shape: tuple[int, int]
    index_U: Tensor
    label_U: Tensor
    final_Ud: Tensor
    logz_U: Tensor | None
    target: TargetRows | None = None

    @property
    def taught_BT(self) -> Tensor:
        """Whether position u teaches."""
        B, T = self.shape
        taught_M = torch.zeros(B * T, dtype=torch.bool, device=self.index_U.device)
        taught_M[self.index_U] = True
        return taught_M.view(B, T)

    def taught(
        self, projection: TargetProjection, start: int, stop: int
    ) -> TargetRows | TargetLogits:
        """p at the teacher positions [start, stop)."""
        if self.target is not None:
            return self.target.take(slice(start, stop))
        logz_n = None if self.logz_U is None else self.logz_U[start:stop]
        return projection.rows(self.final_Ud[start:stop], logz_n)


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
    mask_lag: int = 0,
) -> Lesson:
    """Pick the positions u whose next token x_{u+1} is to be learned.

    With `mask_lag` n they are those with learn[u+1-n], as in released code whose mask is n
    positions late: it leaves out the first n tokens to learn of an answer and counts the n tokens
    behind its end, if they exist.
    """
    B, T = tokens_BT.shape
    lagged_BT = F.pad(learn_BT, (mask_lag, 0))[:, :T]  # at v: learn[v-n]
    counts_BT = torch.zeros_like(learn_BT, dtype=torch.bool)
    counts_BT[:, :-1] = lagged_BT[:, 1:]
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
