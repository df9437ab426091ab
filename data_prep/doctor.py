"""The mask doctor: every example is examined before it is written, and can be looked at.

A wrong mask costs days and shows nothing while training: the loss falls, and the drafter is
accepted at chance where it is served. The four signs of it are refused here.
"""

from rich.text import Text

from conf.console import console, say
from data_prep.chat import EMPTY_THOUGHT, end_ids, generation_prompt, stretches
from data_prep.shards import Example, ShardReader
from models.target import Target

THOUGHT_TOKENS = 32
"""How far before an answer its generation prompt may stand: room for an empty thought."""


class Doctor:
    """Examines examples of one target."""

    def __init__(self, target: Target) -> None:
        self.tokenizer = target.tokenizer
        self.ends = end_ids(target.tokenizer) | set(target.eos_ids)
        self.opening = generation_prompt(target.tokenizer)
        self.opening_length = len(self.tokenizer.tokenize(self.opening)) if self.opening else 0

    def complaint(self, example: Example) -> str | None:
        """What is wrong with an example's mask, or None. Plain text may be learned throughout."""
        tokens, learn = example.tokens.tolist(), example.learn.tolist()
        if len(tokens) != len(learn):
            return f"has {len(tokens)} tokens but a mask of {len(learn)}"
        if not any(learn):
            return "has nothing to learn: its mask is all zero"
        if example.finish_reason is None:
            return None
        if all(learn):
            return "has nothing but tokens to learn: its mask is all one, the prompt included"
        runs = stretches(learn)
        for number, (start, stop) in enumerate(runs):
            if not self._follows_opening(tokens, start):
                seen = self._decode(tokens[max(0, start - self.opening_length) : start])
                return (
                    f"is off: its first learned token {self._decode(tokens[start : start + 1])!r} "
                    f"(position {start}) follows {seen!r}, not the generation prompt "
                    f"{self.opening!r}"
                )
            cut_off = example.finish_reason == "length" and number == len(runs) - 1
            if not cut_off and tokens[stop - 1] not in self.ends:
                last = self._decode(tokens[stop - 1 : stop])
                return (
                    f"learns an answer up to {last!r} (position {stop - 1}), which is no end "
                    "token, although the answer was finished"
                )
        return None

    def examine(self, examples: list[Example], what: str) -> None:
        """Raises ValueError when any example is ill, with the first and how many."""
        ill = [(e.id, c) for e in examples if (c := self.complaint(e))]
        if ill:
            raise ValueError(
                f"{len(ill)} of {len(examples)} examples of {what} have a wrong learn mask; "
                f"the first, {ill[0][0]}, {ill[0][1]}. Look at them with `python -m data_prep "
                "show=5`; the data or the chat template must be repaired before training."
            )

    def show(self, reader: ShardReader, count: int) -> None:
        """Print examples spread over a split: learned tokens green, the others dim."""
        count = min(count, len(reader))
        for number in range(count):
            example = reader[number * len(reader) // count]
            learned = int(example.learn.sum())
            say(
                f"--- {example.id} | {len(example.tokens)} tokens, {learned} learned | "
                f"category {example.category} | finish {example.finish_reason} | temperature "
                f"{example.temperature}, seed {example.seed}"
            )
            console.print(self.coloured(example), soft_wrap=True)

    def coloured(self, example: Example) -> Text:
        """The whole text; stretches are decoded as a whole, so that no character is torn."""
        tokens, learn = example.tokens.tolist(), example.learn.tolist()
        text, at = Text(), 0
        for start, stop in [*stretches(learn), (len(tokens), len(tokens))]:
            text.append(self._decode(tokens[at:start]), style="dim")
            text.append(self._decode(tokens[start:stop]), style="bold green")
            at = stop
        return text

    def _follows_opening(self, tokens: list[int], start: int) -> bool:
        """The generation prompt stands right before, with nothing but an empty thought between."""
        if not self.opening:
            return start > 0
        before = self._decode(tokens[max(0, start - self.opening_length - THOUGHT_TOKENS) : start])
        head, found, tail = before.rpartition(self.opening)
        del head
        return bool(found) and (not tail or EMPTY_THOUGHT.fullmatch(tail) is not None)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
