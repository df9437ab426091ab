"""A drafter that reads tokens only, of the target's architecture; and a test of samples."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.drafter.base import Depth, Drafter, Frontier
from models.generator_target import GeneratorTarget
from models.head import Head
from models.head.own import OwnHead
from models.target import Features, Target


class ToyLm(Drafter):
    """The target itself (`layers` of it), with dropout on its states if asked for."""

    reads_features = False

    def __init__(
        self, *, target: Target, vocab: int | None = None, layers: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__(
            hidden_size=target.hidden_size, vocab_size=target.vocab_size, draft_vocab_size=vocab
        )
        self.decoder: Any = copy.deepcopy(target.model.get_decoder()).requires_grad_().train()
        self.decoder.layers = self.decoder.layers[:layers]
        self.decoder.config.num_hidden_layers = layers
        self.own = OwnHead(hidden_size=target.hidden_size, vocab_size=vocab or target.vocab_size)
        self.dropout = nn.Dropout(dropout)
        if vocab is not None:
            # Every end-of-answer token can be drafted.
            self.set_vocab(torch.arange(vocab))
        self.bind(target)
        self.own.init_from(target, self.draft_ids_D)

    @property
    def num_depths(self) -> int:
        return 1

    def head(self, depth: int) -> Head:
        return self.own

    def read(self, tokens_BT: Tensor, **settings: Any) -> Tensor:
        out = self.decoder(
            input_ids=tokens_BT,
            attention_mask=settings.get("attention_mask"),
            position_ids=settings.get("positions_BT"),
            past_key_values=settings.get("cache"),
            use_cache=settings.get("cache") is not None,
        )
        return self.dropout(out.last_hidden_state)

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        yield Depth(self.read(tokens_BT), self.own, shift=0)

    def as_generator_target(self) -> GeneratorTarget:
        return GeneratorTarget(self)

    def extend(self, state: Any, features: Features, tokens_1N: Tensor) -> Any:
        raise NotImplementedError

    def step(self, state: Any, depth: int, frontier: Frontier) -> tuple[Any, Tensor]:
        raise NotImplementedError


def chi_square_z(tokens: list[int], law_V: Tensor) -> float:
    """How many standard deviations Pearson's statistic is above its mean; rare ids are one bin."""
    seen = torch.bincount(torch.tensor(tokens), minlength=len(law_V)).double()
    wanted = law_V.double() * len(tokens)
    common = wanted >= 5
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    wanted = torch.cat([wanted[common], wanted[~common].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
