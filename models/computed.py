"""Rows of a batch that are computed, where the states of the others are looked at by nobody.

Prompts are half of the tokens of a chat, or more, and teach nothing. A state of shift s at position
t is taught iff position t + s teaches (train/lesson.py); others need no state, only what later
positions read of them.

Shape legend: B sequences, T positions, M = B*T, N computed rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ComputedRows:
    """Some rows of `[B, T]`; their tensors are `[1, N, ...]`, as those of one sequence.

    `index_N` is b*T + t, ascending, each once.
    """

    shape: tuple[int, int]
    index_N: Tensor

    @staticmethod
    def of(taught_BT: Tensor, shifts: Iterable[int]) -> "ComputedRows":
        """Rows t whose state of one of the shifts is taught: taught[t+s] for some s of them.

        The very first row where there is none: layers want one.
        """
        B, T = taught_BT.shape
        some_BT = torch.zeros_like(taught_BT)
        for s in shifts:
            if s < T:
                some_BT[:, : T - s] |= taught_BT[:, s:]
        index_N = some_BT.flatten().nonzero()[:, 0]
        return ComputedRows((B, T), index_N if len(index_N) else index_N.new_zeros(1))

    @property
    def share(self) -> float:
        """Of all rows of the batch, padding included."""
        B, T = self.shape
        return len(self.index_N) / max(1, B * T)

    @property
    def positions_1N(self) -> Tensor:
        """t of every row."""
        return (self.index_N % self.shape[1])[None]

    def within(self, outer: "ComputedRows") -> "ComputedRows":
        """The same rows among those of `outer`, which has them all."""
        at_N = torch.searchsorted(outer.index_N, self.index_N)
        return ComputedRows((1, len(outer.index_N)), at_N)

    @property
    def complete(self) -> bool:
        """Whether these are all rows, so that taking them out and putting them back is nothing."""
        return len(self.index_N) == self.shape[0] * self.shape[1]

    @cached_property
    def packed(self) -> tuple["ComputedRows", Tensor]:
        """The same rows side by side in every sequence, and their positions, `[B, P]`.

        P is the most that a sequence has; where it has fewer, its last position stands again.
        """
        B, T = self.shape
        sequence_N, t_N = self.index_N // T, self.index_N % T
        count_B = torch.bincount(sequence_N, minlength=B)
        P = int(count_B.max())
        before_B = count_B.cumsum(0) - count_B
        place_N = torch.arange(len(t_N), device=t_N.device) - before_B[sequence_N]
        at_BP = t_N.new_zeros(B, P)
        at_BP[sequence_N, place_N] = t_N
        return ComputedRows((B, P), sequence_N * P + place_N), at_BP.cummax(1).values

    def take(self, x_BT: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[1, N, ...]`."""
        if self.complete:
            return x_BT.flatten(0, 1)[None]
        return _Take.apply(x_BT.flatten(0, 1), self.index_N)[None]  # type: ignore[index]

    def put(self, x_1N: Tensor) -> Tensor:
        """`[1, N, ...]` -> `[B, T, ...]`, zeros elsewhere."""
        B, T = self.shape
        if self.complete:
            return x_1N[0].unflatten(0, (B, T))
        whole = x_1N.new_zeros(B * T, *x_1N.shape[2:])
        return whole.index_copy(0, self.index_N, x_1N[0]).unflatten(0, (B, T))

    def take_heads(self, x_BHT: Tensor) -> Tensor:
        """`[B, H, T, ...]` -> `[1, H, N, ...]`."""
        return self.take(x_BHT.transpose(1, 2)).transpose(1, 2)

    def put_heads(self, x_1HN: Tensor) -> Tensor:
        """`[1, H, N, ...]` -> `[B, H, T, ...]`, zeros elsewhere."""
        return self.put(x_1HN.transpose(1, 2)).transpose(1, 2)


def at_rows(
    rows: ComputedRows | None, function: Callable[..., Tensor], *parts_BT: Tensor
) -> Tensor:
    """A function of rows by themselves, at these rows (None: everywhere), as `[B, T, ...]`."""
    if rows is None:
        return function(*parts_BT)
    return rows.put(function(*(rows.take(part) for part in parts_BT)))


class _Take(torch.autograd.Function):
    """x[index]. No row is taken twice, so that gradients are copied to their rows, not added."""

    @staticmethod
    def forward(ctx: Any, x_M: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.shape = x_M.shape
        return x_M.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        zeros_M = outer[0].new_zeros(ctx.shape)
        return zeros_M.index_copy_(0, index_N, outer[0]), None
