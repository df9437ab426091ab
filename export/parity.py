"""Proof that an export drafts what the trained drafter drafts.

The target reads real text once in fp32; at many positions both continue it greedily, the trained
drafter through its own decoding view and the export through an independent reader of its format.
Every token must be equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from conf.console import console
from export.base import Reader
from models.drafter.base import Drafter
from models.target import Features, Target

MAX_TOKENS = 256
POSITIONS = 16


@dataclass(frozen=True)
class Proof:
    """How much was compared."""

    texts: int
    chains: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.tokens} drafted tokens in {self.chains} greedy chains over {self.texts} texts, "
            "all equal to the trained drafter's"
        )


def prove_equal(
    *, trained: Reader, exported: Reader, drafter: Drafter, target: Target, texts: Sequence[Tensor]
) -> Proof:
    """Compare the two readers on `texts` (token ids, `[T]`). Raises ValueError at a difference."""
    chains = tokens = 0
    for number, text_T in enumerate(
        track(texts, "Comparing drafts", console=console, transient=True)
    ):
        tokens_1T = text_T[:MAX_TOKENS].to(target.device)[None]
        length = tokens_1T.shape[1]
        if length < 2:
            continue
        features = target.forward(tokens_1T, layers=drafter.feature_layers)
        # A chain after x_0..x_{n-1} reads features of positions 0..n-2.
        ends = torch.linspace(2, length, min(POSITIONS, length - 1)).long().unique().tolist()
        for n in ends:
            before: Features = features[:, : n - 1]
            want = trained.draft(before, tokens_1T[:, :n])
            got = exported.draft(before, tokens_1T[:, :n])
            if want != got:
                raise ValueError(
                    f"The export drafts {got} after the first {n} tokens of validation text "
                    f"{number}, but the trained drafter drafts {want}; nothing was exported, "
                    "because an engine would silently accept fewer tokens. The exporter for this "
                    "format is wrong or the run's files changed since training."
                )
            chains += 1
            tokens += len(want)
    if not tokens:
        raise ValueError(
            "There was no validation text of two tokens or more to prove the export with; raise "
            "prove=<texts>, or prepare a dataset with held-out prompts."
        )
    return Proof(len(texts), chains, tokens)
