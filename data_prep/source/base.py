"""What a source is: something that yields conversations, and says what it had to leave out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from conf.console import say
from data_prep.conversation import Conversation
from models.target import Target


@dataclass(kw_only=True)
class Source(ABC):
    """Base of all sources. The fields of a subclass are its settings.

    `skipped` lists what the last reading left out, one sentence a record; a source that leaves
    anything out must say so there.
    """

    skipped: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @abstractmethod
    def read(self) -> Iterator[Conversation]:
        """All conversations, in a fixed order. Raises ValueError where one cannot be read."""

    def read_with(self, target: Target) -> Iterator[Conversation]:
        """The same for a source that needs the target (`self_written`); others ignore it."""
        del target
        return self.read()

    @property
    def benchmark(self) -> str | None:
        """Why this source must not be trained on, or None."""
        return None

    @property
    def to_write(self) -> int:
        """How many prompts the target has to write itself when this source is read."""
        return 0

    def settings(self) -> dict[str, Any]:
        """What decides the conversations: a dataset made with other settings is another one."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {"kind": f"{type(self).__module__}.{type(self).__qualname__}", **own}

    def report(self, name: str) -> None:
        """Say what was left out, in full up to five records."""
        if self.skipped:
            say(f"{name}: {len(self.skipped)} left out:")
            for line in self.skipped[:5]:
                say(f"  {line}")
            if len(self.skipped) > 5:
                say(f"  ... and {len(self.skipped) - 5} more")
