"""What every source yields: a conversation, or a piece of plain text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, TypeVar

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant" | "text", "content": str}."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order. `id` is stable: "<source>/<index>".

    Plain text (nobody speaks) is one message with the role "text". A list of questions without the
    answers between them (MT-bench's `turns`) is user messages that follow each other directly.
    """

    id: str
    messages: tuple[Message, ...]
    category: str | None = None

    @property
    def label(self) -> str:
        """The category, or else the source's name."""
        return self.category or self.id.rpartition("/")[0]

    @property
    def is_text(self) -> bool:
        return self.messages[0]["role"] == "text"

    def prompt(self, turn: Literal["first", "last"] = "first") -> tuple[Message, ...]:
        """The messages a model is asked to answer: up to the first, or the last, user turn.

        Raises ValueError when there is no such prompt.
        """
        asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not asked:
            raise ValueError(
                f"Record {self.id} has no user message (it has "
                f"{', '.join(m['role'] for m in self.messages)}), so there is no prompt to answer; "
                "use its own text (dataset.tokenize), or leave this source out."
            )
        messages = self.messages[: asked[0 if turn == "first" else -1] + 1]
        follows = [b for a, b in pairwise(asked) if b == a + 1]
        if turn == "last" and follows:
            raise ValueError(
                f"Record {self.id} is a list of questions without the answers between them, so its "
                'last turn cannot be asked alone; use turn: "first".'
            )
        return messages


def stable_hash(text: str) -> int:
    """A 64-bit number that is the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def prompt_id(example_id: str) -> str:
    """The conversation's id: "<source>/<index>" without #sample or +piece behind the index."""
    source, slash, index = example_id.rpartition("/")
    return source + slash + index.partition("#")[0].partition("+")[0]


class HasId(Protocol):
    """Anything that can be drawn by its id."""

    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=HasId)


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """`limit` items drawn evenly from all (lowest hash of the id), in their old order."""
    if limit is None or limit >= len(items):
        return list(items)
    kept = {item.id for item in sorted(items, key=lambda c: stable_hash(c.id))[:limit]}
    return [item for item in items if item.id in kept]
