"""Prompt lookup decoding (Saxena, 2023; n-gram matching in transformers, vLLM and Spec-Bench).

Shape legend: N tree nodes, T positions.
"""

import torch
from torch import Tensor

from decode.baselines.base import Baseline
from models.target import Features
from models.tree import Policy, Tree


class PromptLookup(Baseline):
    """Copies what followed the last few tokens the first time they occurred.

    For n = max_ngram, ..., min_ngram: if the last n tokens of prompt and answer occurred before,
    draft the (up to) `gamma` tokens behind their first occurrence, as a chain. No match, no draft:
    the round is then plain decoding. Good where answers repeat their prompt (summaries, retrieval,
    code edits). One deviation from the first implementation: fewer than `gamma` tokens behind a
    match are drafted too, as in transformers, instead of looking on.
    """

    reads_features = False

    def __init__(self, *, gamma: int = 10, max_ngram: int = 3, min_ngram: int = 1) -> None:
        super().__init__()
        if gamma < 1 or not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"Prompt lookup was given gamma={gamma}, min_ngram={min_ngram} and "
                f"max_ngram={max_ngram}; expected gamma of at least 1 and 1 <= min_ngram <= "
                "max_ngram, because it drafts gamma tokens behind a match of so many tokens."
            )
        self.gamma = gamma
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    @property
    def name(self) -> str:
        return f"lookup{self.gamma}"

    def start(self, features: Features, tokens_1T: Tensor) -> "Text":
        return self.extend(Text(self.min_ngram, self.max_ngram), features, tokens_1T)

    def extend(self, state: "Text", features: Features, tokens_1N: Tensor) -> "Text":
        for token in tokens_1N[0].tolist():
            state.add(token)
        return state

    def propose(self, state: "Text", root: Tensor, policy: Policy | None = None) -> Tree:
        assert int(root) == state.tokens[-1], "the root is the last known token"
        chain = [state.tokens[-1], *state.continuation(self.gamma)]
        steps_N = torch.arange(len(chain), device=root.device)
        return Tree(
            torch.tensor(chain, device=root.device),
            steps_N - 1,
            steps_N,
            torch.ones(len(chain), device=root.device),
        )


class Text:
    """Prompt and answer so far, and where each of their n-grams first went on."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self.tokens: list[int] = []
        self._lengths = range(min_ngram, max_ngram + 1)
        self._behind: dict[tuple[int, ...], int] = {}

    def add(self, token: int) -> None:
        """Append a token: the n-grams that end just before it have a continuation from now on, so
        that the last tokens of the text never match themselves."""
        place = len(self.tokens)
        for n in self._lengths:
            if n <= place:
                self._behind.setdefault(tuple(self.tokens[place - n :]), place)
        self.tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """Up to `count` tokens behind the first occurrence of the longest n-gram that matches."""
        for n in reversed(self._lengths):
            place = self._behind.get(tuple(self.tokens[-n:])) if n <= len(self.tokens) else None
            if place is not None:
                return self.tokens[place : place + count]
        return []
