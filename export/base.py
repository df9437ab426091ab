"""What every exporter does: write, read back by another way, say how to serve."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from models.drafter.base import Drafter
from models.target import Features, Target

Precision = Literal["float32", "bfloat16", "float16"]


class Reader(Protocol):
    """An exported checkpoint as its engine would use it."""

    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """The greedy chain after tokens x_0..x_{T-1}, from features of positions 0..T-2."""
        ...


class Exporter(ABC):
    """Writes a drafter in the format of one engine.

    `dtype` is the precision of the written weights; None keeps the one they were trained in.
    """

    name: ClassVar[str]
    engine: ClassVar[str]

    def __init__(self, *, dtype: Precision | None = None) -> None:
        self.dtype = dtype

    def cast(self, drafter: Drafter) -> Drafter:
        """The drafter in the precision that is written."""
        return drafter if self.dtype is None else drafter.to(getattr(torch, self.dtype))

    @abstractmethod
    def refuse(self, drafter: Drafter) -> None:
        """Raise ValueError when this engine cannot run the drafter, saying what can."""

    @abstractmethod
    def write(self, drafter: Drafter, folder: Path) -> None:
        """Write configuration and weights into an existing empty folder."""

    @abstractmethod
    def read(self, folder: Path, target: Target) -> Reader:
        """Open what `write` wrote, sharing no code with it."""

    @abstractmethod
    def usage(self, *, target: str, depths: int) -> str:
        """Markdown that tells a reader of the model card how to use the folder."""
