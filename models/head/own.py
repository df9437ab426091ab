"""A trained vocabulary matrix of the drafter's own."""

from typing import Literal

import torch
from torch import Tensor, nn

from models.head.base import Head
from models.target import Target


class OwnHead(Head):
    """logits = U y (+ b), U: D x d.

    Medusa and Hydra train one per depth; EAGLE-3 one over its draft vocabulary. `start` gives U the
    target's rows, or random ones (as in EAGLE-3's released code). What the target's rows are worth
    depends on the family: Hydra's heads read a state that begins as the target's own feature, and
    lose 0.1 to 0.2 tokens per step after a short training without them (docs/families.md).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        bias: bool = False,
        start: Literal["target", "random"] = "target",
    ) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self.start = start
        self.linear = nn.Linear(hidden_size, vocab_size, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states)

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        return self.linear.weight, self.linear.bias

    def init_from(self, target: Target, draft_ids_D: Tensor | None) -> None:
        if self.start == "random":
            return
        weight = target.head_weight_Vd
        self.copy_rows(weight if draft_ids_D is None else weight[draft_ids_D])

    @torch.no_grad()
    def copy_rows(self, rows_Dd: Tensor) -> None:
        self.linear.weight.copy_(rows_Dd)
        if self.linear.bias is not None:
            self.linear.bias.zero_()
