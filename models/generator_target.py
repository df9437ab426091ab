"""A drafter that reads tokens only, in the place of a target: sampling from the drafter itself.

Shape legend: B sequences, T positions, d hidden size, V target vocabulary, D draft vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from models.target import Features


class GeneratorTarget:
    """What data_prep.generate.Generator asks of a target, answered by a small language model.

    Tokens are drawn from the drafter's own q, which is 0 outside its draft vocabulary. The weights
    are the drafter's, not a copy: what is trained is sampled from.
    """

    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.drafter.target.eos_ids

    @property
    def device(self) -> torch.device:
        return next(self.drafter.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.drafter.dtype

    @property
    def vocab_size(self) -> int:
        return self.drafter.vocab_size

    @torch.no_grad()
    def forward(
        self,
        tokens_BT: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Features:
        """The drafter's states, in the place of the target's final features."""
        states_BTd = self.drafter.read(
            tokens_BT, attention_mask=attention_mask, positions_BT=positions_BT, cache=cache
        )
        return Features(states_BTd)

    @torch.no_grad()
    def project(self, states: Tensor) -> Tensor:
        """Logits over the target's vocabulary, -inf where nothing can be drafted."""
        logits = self.drafter.head(0)(states)
        if self.drafter.draft_ids_D is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.drafter.vocab_size), float("-inf"))
        return full.index_copy_(-1, self.drafter.draft_ids_D, logits)
