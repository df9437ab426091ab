"""What a benchmark asks: prompts as token ids.

Prompts come through the readers and the chat template of data preparation, so a benchmark file may
have any shape that training data may have.
"""

from pathlib import Path
from typing import Protocol

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from conf.console import say
from data_prep.conversation import spread
from data_prep.prompts import Prompt, read_prompts
from data_prep.shards import ShardReader
from data_prep.source import Source

__all__ = ["Bench", "HeldOut", "Prompt", "Questions"]


class Bench(Protocol):
    """A named set of prompts."""

    name: str

    def prompts(self, *, limit: int | None, max_prompt_tokens: int | None) -> list[Prompt]:
        """`limit` of its prompts, spread evenly; those that are too long are left out, aloud."""
        ...


class Questions:
    """A benchmark read from sources; of each conversation the first user turn is asked."""

    def __init__(
        self, *, name: str, sources: list[Source], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.name = name
        self._sources = sources
        self._tokenizer = tokenizer

    def prompts(self, *, limit: int | None, max_prompt_tokens: int | None) -> list[Prompt]:
        """Rendered with the target's chat template."""
        return read_prompts(
            self._sources, self._tokenizer, limit=limit, max_prompt_tokens=max_prompt_tokens
        )


class HeldOut:
    """The prompts that the run's own data set kept apart for validation."""

    def __init__(self, *, name: str = "heldout", dataset_folder: Path) -> None:
        self.name = name
        self._folder = Path(dataset_folder)

    def prompts(self, *, limit: int | None, max_prompt_tokens: int | None) -> list[Prompt]:
        """Of each held-out example the tokens before the first one to learn: its first prompt.

        An example that is learned from its first token on (plain text) asks nothing and is passed
        over, and so are further answers to a prompt that is already there. The list may be empty.
        """
        if not (self._folder / "manifest.json").is_file():
            raise ValueError(
                f"bench=heldout reads the validation split of the run's data set, expected in "
                f"'{self._folder}', and there is none, because it was moved or made on another "
                "machine; prepare it again with `python -m data_prep`, or name another bench."
            )
        reader = ShardReader(self._folder, "val")
        found: dict[tuple[int, ...], Prompt] = {}
        too_long = 0
        for i in range(len(reader)):
            example = reader[i]
            learned = example.learn.nonzero()
            length = int(learned[0, 0]) if len(learned) else 0
            if max_prompt_tokens is not None and length > max_prompt_tokens:
                too_long += 1
            elif length > 0:
                tokens = example.tokens[:length].tolist()
                category = example.category or example.id.rpartition("/")[0]
                found.setdefault(tuple(tokens), Prompt(example.id, tokens, category))
        if too_long:
            say(f"{too_long} prompts of more than {max_prompt_tokens} tokens are left out.")
        return spread(list(found.values()), limit)
