"""The drafter's own token embedding, used again as its vocabulary head."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.head.base import Head
from models.target import Target


class TiedHead(Head):
    """logits = E[draft ids] y with the drafter's own embedding E, one parameter in two places.

    For families that have an embedding (small language models): they call `tie` once it exists. Its
    gradient is the sum of both uses.
    """

    def __init__(self, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self.weight: nn.Parameter | None = None
        self._ids: list[Tensor | None] = [None]
        self._rows: tuple[tuple[int, int], Tensor] | None = None

    def tie(self, embedding: nn.Embedding) -> None:
        """Share the embedding's matrix `[V, d]`."""
        self.weight = cast(nn.Parameter, embedding.weight)
        self._rows = None

    def bind(self, target: Target, draft_ids_D: Tensor | None) -> None:
        if self.weight is None:
            raise ValueError(
                "head=tied uses a drafter's own token embedding again, and this family has none; "
                "use head@drafter.head=own or frozen."
            )
        self._ids, self._rows = [draft_ids_D], None

    def forget(self) -> None:
        self._rows = None

    def forward(self, states: Tensor) -> Tensor:
        assert self.weight is not None, "the family ties this head to its embedding"
        return F.linear(states, self._draft_rows(self.weight).to(states.dtype))

    def _draft_rows(self, weight_Vd: Tensor) -> Tensor:
        """E[draft ids]. While drafting they are gathered once and not at every step."""
        ids_D = self._ids[0]
        if ids_D is None:
            return weight_Vd
        if torch.is_grad_enabled():
            return weight_Vd[ids_D]
        # A step of the optimizer, a load and a move change the version or the place.
        seen = weight_Vd.data_ptr(), weight_Vd._version
        if self._rows is None or self._rows[0] != seen:
            self._rows = seen, weight_Vd[ids_D]
        return self._rows[1]
