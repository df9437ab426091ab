"""Prompts that the target writes itself, after Magpie (Xu et al. 2024, arXiv 2406.08464).

A chat model that is given its template up to the start of the user's turn, and nothing else,
continues with a plausible user message. So a target brings prompts from the distribution it was
tuned on, without any data set. Sampled at T = 1, top-p 0.95, up to the end of the turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from conf.console import say
from data_prep.chat import end_ids, user_turn_prefix
from data_prep.conversation import Conversation, stable_hash
from data_prep.generate import Answer, Generator, Request
from data_prep.progress import Progress
from data_prep.source.base import Source
from models.target import Target

ATTEMPTS = 4
"""Stop after this many times `count` samples: a target that cannot write prompts must not loop."""


@dataclass(kw_only=True)
class SelfWritten(Source):
    """`count` different user prompts of min_tokens..max_tokens tokens that end by themselves."""

    count: int
    seed: int = 0
    min_tokens: int = 8
    max_tokens: int = 200
    temperature: float = 1.0
    top_p: float = 0.95

    @property
    def to_write(self) -> int:
        return self.count

    def read(self) -> Iterator[Conversation]:
        raise ValueError(
            "The source 'self_written' needs the target to write its prompts, so it cannot be read "
            "here; use it in a dataset, and other sources for a benchmark."
        )

    def requests(self, target: Target, start: int, stop: int) -> list[Request]:
        """Samples number start..stop-1; the seed of each depends on its number only."""
        prefix = user_turn_prefix(target.tokenizer)
        return [
            Request(
                id=f"self_written/{k:06d}",
                tokens=prefix,
                max_new_tokens=self.max_tokens + 1,  # one more for the end of the turn
                temperature=self.temperature,
                top_p=self.top_p,
                seed=stable_hash(f"self_written {self.seed} {k}") % 2**31,
            )
            for k in range(start, stop)
        ]

    def read_with(self, target: Target) -> Iterator[Conversation]:
        self.skipped.clear()
        generator = Generator(target=target)
        kept: dict[str, Conversation] = {}
        asked = 0
        with Progress("the target writes prompts", total=self.count, unit="prompts") as progress:
            while len(kept) < self.count and asked < ATTEMPTS * self.count:
                missing = self.count - len(kept)
                # A quarter more than needed: some will not end, or be too short.
                more = min(missing + missing // 4 + 2, ATTEMPTS * self.count - asked)
                for batch in generator.batches(self.requests(target, asked, asked + more)):
                    answers = generator.answer_batch(batch)
                    before = len(kept)
                    self._sort_out(target, answers, kept)
                    tokens = sum(len(a.tokens) for a in answers)
                    progress.advance(len(kept) - before, tokens=tokens)
                asked += more
        say(
            f"self_written: {min(len(kept), self.count)} prompts kept of {asked} written "
            f"({self.min_tokens}..{self.max_tokens} tokens, ended by themselves, all different)"
        )
        if not kept:
            raise ValueError(
                f"The target '{target.name}' wrote {asked} user turns and none could be kept; it "
                "is probably no chat model. Take self_written out of the dataset's sources."
            )
        yield from list(kept.values())[: self.count]

    def _sort_out(
        self, target: Target, answers: list[Answer], kept: dict[str, Conversation]
    ) -> None:
        """Keep the good ones, in the order of their numbers; say why the others go."""
        tokenizer = target.tokenizer
        ends = end_ids(tokenizer) | set(target.eos_ids)
        for answer in sorted(answers, key=lambda a: a.id):
            if answer.finish_reason != "eos":
                self.skipped.append(f"{answer.id} did not end within {self.max_tokens} tokens")
                continue
            body = answer.tokens[:-1]
            text = str(tokenizer.decode(body)).strip()
            if not self.min_tokens <= len(body) <= self.max_tokens:
                self.skipped.append(f"{answer.id} has {len(body)} tokens")
            elif ends & set(body) or "\ufffd" in text or not text:
                self.skipped.append(f"{answer.id} is no clean text")
            elif " ".join(text.casefold().split()) in kept:
                self.skipped.append(f"{answer.id} was written before")
            else:
                message = {"role": "user", "content": text}
                key = " ".join(text.casefold().split())
                kept[key] = Conversation(answer.id, (message,), "self_written")
