"""Sampled sequences, and a ring of them to train on again.

Shape legend: B sequences, N tokens of all of them one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampled:
    """A prompt and its continuation: the tokens from `prompt` on were sampled and are learned."""

    tokens: Tensor
    prompt: int

    @property
    def learned(self) -> int:
        return len(self.tokens) - self.prompt


def prompt_of(tokens_T: Tensor, learn_T: Tensor) -> list[int]:
    """The tokens before the first one to learn. Token 0 has no teacher and is always prompt."""
    first = int(learn_T[1:].nonzero()[0, 0]) + 1
    return tokens_T[:first].tolist()


class Ring:
    """The last `size` sampled sequences."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[Sampled] = []
        self.oldest = 0

    def add(self, sequences: Sequence[Sampled]) -> None:
        """Put them in; the oldest go."""
        for sequence in sequences:
            if len(self.items) < self.size:
                self.items.append(sequence)
            else:
                self.items[self.oldest] = sequence
                self.oldest = (self.oldest + 1) % self.size

    def pick(self, rows: int, budget: int, rng: np.random.Generator) -> list[Sampled]:
        """Up to `rows` different sequences of similar length, at most `budget` padded tokens.

        They are neighbours, by length, of one chosen at random. At least one is returned.
        """
        order = sorted(range(len(self.items)), key=lambda i: len(self.items[i].tokens))
        centre = int(rng.integers(len(order)))
        count = min(rows, len(order))
        while True:
            first = min(max(0, centre - count // 2), len(order) - count)
            longest = len(self.items[order[first + count - 1]].tokens)
            if count == 1 or count * longest <= budget:
                return [self.items[i] for i in order[first : first + count]]
            count -= 1

    def state_dict(self) -> dict[str, Any]:
        """As tensors: the tokens of all sequences, their lengths and the lengths of the prompts."""
        tokens = [s.tokens.to(torch.int32) for s in self.items]
        return {
            "tokens_N": torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int32),
            "length_B": torch.tensor([len(t) for t in tokens], dtype=torch.long),
            "prompt_B": torch.tensor([s.prompt for s in self.items], dtype=torch.long),
            "oldest": self.oldest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = state["tokens_N"].long().split(state["length_B"].tolist())
        pairs = zip(parts, state["prompt_B"].tolist(), strict=True)
        self.items = [Sampled(tokens.clone(), prompt) for tokens, prompt in pairs]
        self.oldest = int(state["oldest"])
