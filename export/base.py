"""What every exporter does: write, read back by another way, say how to serve."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from data_prep.prompts import Prompt
from export.served import Served
from models.drafter.base import Drafter
from models.target import Features, Target

Precision = Literal["float32", "bfloat16", "float16"]
UNLIMITED = 8
"""Drafts a chain is compared over, for a family that sets no limit."""


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
    library: ClassVar[str] = "draftsmith"
    """What the Hub says the folder is loaded with."""
    writes_text: ClassVar[bool] = False
    """Whether the folder is a language model of its own."""

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

    def refuse_to_measure(self) -> None:
        """Raise ValueError when the engine cannot run here."""
        raise ValueError(
            f"measure= decodes prompts with the engine itself, and exporter={self.name} has none "
            "that runs inside this command, only exporter=assistant has (transformers); leave "
            "measure=0, or see docs/engines.md for engines that are installed apart."
        )

    def measure(
        self,
        folder: Path,
        *,
        drafter: Drafter,
        target: Target,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> Served:
        """Decode prompts with the engine and the export; ValueError when it gives other text or
        other tokens per step than the reference decoder."""
        raise NotImplementedError

    @abstractmethod
    def usage(self, *, target: str, depths: int) -> str:
        """Markdown that tells a reader of the model card how to use the folder."""
