"""The target's own vocabulary head, frozen, whole or restricted to a draft vocabulary."""

from torch import Tensor
from torch.nn import functional as F

from models.head.base import Head
from models.target import Target


class FrozenHead(Head):
    """logits = W[draft ids] y with the target's W. Has no parameters and stores nothing."""

    def __init__(self, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self._rows: list[Tensor] = []  # in a list: neither a parameter nor a buffer

    def forward(self, states: Tensor) -> Tensor:
        assert self._rows, "bind(target) comes before the first forward"
        return F.linear(states, self._rows[0].to(states.dtype))

    def bind(self, target: Target, draft_ids_D: Tensor | None) -> None:
        weight = target.head_weight_Vd
        self._rows = [weight if draft_ids_D is None else weight[draft_ids_D]]
