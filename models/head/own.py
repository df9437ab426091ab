"""A trained vocabulary matrix of the drafter's own."""

import torch
from torch import Tensor, nn

from models.head.base import Head
from models.target import Target


class OwnHead(Head):
    """logits = U y (+ b), U: D x d, started from the target's rows.

    Medusa and Hydra train one per depth; EAGLE-3 one over its draft vocabulary.
    """

    def __init__(self, *, hidden_size: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self.linear = nn.Linear(hidden_size, vocab_size, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states)

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        return self.linear.weight, self.linear.bias

    def init_from(self, target: Target, draft_ids_D: Tensor | None) -> None:
        weight = target.head_weight_Vd
        self.copy_rows(weight if draft_ids_D is None else weight[draft_ids_D])

    @torch.no_grad()
    def copy_rows(self, rows_Dd: Tensor) -> None:
        self.linear.weight.copy_(rows_Dd)
        if self.linear.bias is not None:
            self.linear.bias.zero_()
