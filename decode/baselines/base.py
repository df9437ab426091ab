"""What every method without training does. It stands where a drafter stands in the decoder.

Shape legend: N tree nodes, T positions, V target vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from models.target import Features, Target
from models.tree import Policy, Tree


class Baseline(ABC):
    """Drafts from the text and from what the target has said, with no weights of its own.

    Called like a `Drafter`: `start` reads a prompt, `extend` what was verified, `propose` drafts
    from the root. Its trees are deterministic (q one-hot), so they are verified exactly at every
    temperature. The shape of its drafts is its own; there is no policy to choose one.
    """

    feature_layers: tuple[int, ...] = ()
    reads_features: bool = True

    def __init__(self) -> None:
        self._bound: list[Target] = []

    def bind(self, target: Target) -> "Baseline":
        """Give access to the target. Forgets everything learned from another one."""
        self._bound = [target]
        self.forget()
        return self

    @property
    def target(self) -> Target:
        """The target given to `bind`."""
        assert self._bound, "bind(target) comes before this"
        return self._bound[0]

    @property
    def dtype(self) -> torch.dtype:
        """Features are taken as the target makes them."""
        return self.target.dtype

    @property
    @abstractmethod
    def name(self) -> str:
        """The shape of its drafts in a word, for tables."""

    def forget(self) -> None:  # noqa: B027
        """Drop what was learned from earlier prompts. Nothing, unless a method keeps some."""

    def read(self, tree: Tree, logits_NV: Tensor) -> None:  # noqa: B027
        """The target has read a tree: its logits at every node, also at those it refused."""

    @abstractmethod
    def start(self, features: Features, tokens_1T: Tensor) -> Any:
        """Read a prompt: features of positions 0..T-2 and tokens x_0..x_{T-1} (one more)."""

    @abstractmethod
    def extend(self, state: Any, features: Features, tokens_1N: Tensor) -> Any:
        """Read verified positions; tokens run one ahead of features, the last is the next root."""

    @abstractmethod
    def propose(self, state: Any, root: Tensor, policy: Policy | None = None) -> Tree:
        """A draft tree from the known token `root`; the root alone where there is nothing to say.

        `policy` is there for the drafter's signature and is not read.
        """
