"""What every exporter does: write, read back by another way, say how to serve."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from models.drafter.base import Drafter
from models.target import Features, Target

Precision = Literal["float32", "bfloat16", "float16"]
UNLIMITED = 8
"""Drafts a chain is compared over, for a family that sets no limit."""


HERE = "path/to/this/folder"
"""What a model card calls the folder it lies in."""
THERE = "path/to/the/target"
"""What it calls a target that has no name elsewhere."""


def commands(usage: str) -> list[tuple[str, str]]:
    """The blocks of a card that one can run, as (bash or python, text)."""
    return re.findall(r"```(bash|python)\n(.*?)\n```", usage, flags=re.DOTALL)


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
    library: str = "draftsmith"
    """What the Hub says the folder is loaded with."""
    writes_text: bool = False
    """Whether the folder is a language model of its own."""
    served_by: ClassVar[tuple[str, ...]] = ()
    """Engines (export/engine) that run here and load the folder; the first proves it unless another
    is named."""

    def __init__(self, *, dtype: Precision | None = None) -> None:
        self.dtype = dtype

    def cast(self, drafter: Drafter) -> Drafter:
        """The drafter in the precision that is written."""
        return drafter if self.dtype is None else drafter.to(getattr(torch, self.dtype))

    @abstractmethod
    def refuse(self, drafter: Drafter) -> None:
        """Raise ValueError when this engine cannot run the drafter, saying what can."""

    @abstractmethod
    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        """Write configuration and weights into an existing empty folder.

        `texts` (token ids, `[T]`) are there for formats that must first see the drafter's states.
        """

    @abstractmethod
    def read(self, folder: Path, target: Target) -> Reader:
        """Open what `write` wrote, sharing no code with it."""

    def compare(
        self, folder: Path, *, drafter: Drafter, target: Target, texts: Sequence[Tensor]
    ) -> dict[str, float]:
        """What is proven beside equal drafts, as named figures; ValueError when it fails."""
        return {}

    def chain_length(self, drafter: Drafter) -> int:
        """Drafts a round that an engine is told to make with the folder."""
        return drafter.num_depths

    @abstractmethod
    def usage(self, *, target: str, depths: int) -> str:
        """Markdown that tells a reader of the model card how to use the folder, which it calls
        `HERE`; commands stand in bash or python blocks, and the export prints them with the real
        path."""
