"""The only source of randomness in decoding.

Verifiers and draft policies ask for a coin or a draw and nothing else, so a test can put a branch
enumerator in this place and read the exact law of the output.

Shape legend: V vocabulary, N distributions, S draws.
"""

from random import Random
from typing import Protocol

import torch
from torch import Tensor

from models.sampling import draw_many


class Chance(Protocol):
    """What a randomised rule may ask for."""

    def coin(self, probability: float) -> bool:
        """True with this probability."""
        ...

    def draw(self, p_V: Tensor) -> int:
        """An id with probability p_V[id]."""
        ...


class SeededChance:
    """Chance from a seed, the same on every device (uniforms are made on the CPU)."""

    def __init__(self, *, seed: int) -> None:
        self._random = Random(seed)

    def coin(self, probability: float) -> bool:
        """random() lies in [0, 1): probability 0 never happens and probability 1 always does."""
        return self._random.random() < probability

    def draw(self, p_V: Tensor) -> int:
        """Inversion of the cumulative sum in double precision; ids of probability 0 never occur."""
        cdf_V = p_V.cumsum(-1, dtype=torch.double)
        point = self._random.random() * float(cdf_V[-1])
        drawn = int(torch.searchsorted(cdf_V, point, right=True))
        # Rounding of the product can reach the last sum itself: then the last possible id is meant.
        return drawn if drawn < len(p_V) else int(p_V.nonzero()[-1])

    def draws(self, p_NV: Tensor, count: int) -> Tensor:
        """`count` independent ids from each row, `[N, S]`. Drafting asks for many at once."""
        uniform_NS = [[self._random.random() for _ in range(count)] for _ in range(len(p_NV))]
        return draw_many(p_NV, torch.tensor(uniform_NS, dtype=torch.double))
