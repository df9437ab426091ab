"""The target's own vocabulary head, frozen, whole or restricted to a draft vocabulary."""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.head.base import Head
from models.target import Target


class FrozenHead(Head):
    """logits = W[draft ids] y with the target's W and its soft cap, if it has one.

    Has no parameters and stores nothing.
    """

    def __init__(self, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self._cap: float | None = None
        self._rows: list[Tensor] = []  # in a list: neither a parameter nor a buffer

    def forward(self, states: Tensor) -> Tensor:
        assert self._rows, "bind(target) comes before the first forward"
        logits = F.linear(states, self._rows[0].to(states.dtype))
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def matrix(self) -> tuple[Tensor, None] | None:
        assert self._rows, "bind(target) comes before the first forward"
        return (self._rows[0], None) if self._cap is None else None

    def bind(self, target: Target, draft_ids_D: Tensor | None) -> None:
        weight = target.head_weight_Vd
        self._rows = [weight if draft_ids_D is None else weight[draft_ids_D]]
        self._cap = getattr(target.config, "final_logit_softcapping", None)
