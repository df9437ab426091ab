"""Use the answers that the data already has (off-policy)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from conf.console import say
from data_prep.chat import Learn, end_ids, tokens_and_mask
from data_prep.conversation import Conversation
from data_prep.shards import Example
from models.target import Target


@dataclass(kw_only=True)
class Tokenize:
    """Conversations with their own answers -> examples.

    A conversation longer than `max_tokens` is cut there (its answer then has no end token, finish
    reason "length"); plain text is cut into several pieces. Without an answer, or where no exact
    mask can be made, on_bad="error" stops and "skip" leaves the conversation out and reports it.
    """

    learn: Learn = "all"
    max_tokens: int = 1024
    on_bad: Literal["error", "skip"] = "error"

    def run(self, target: Target, conversations: Sequence[Conversation]) -> list[Example]:
        examples: list[Example] = []
        left_out: list[str] = []
        for conversation in conversations:
            try:
                examples += self._examples(target, conversation)
            except ValueError as error:
                if self.on_bad == "error":
                    raise ValueError(
                        f"Record {conversation.id}: {error} (dataset.tokenize.on_bad: skip leaves "
                        "such records out and reports them.)"
                    ) from error
                left_out.append(f"{conversation.id}: {error}")
        if left_out:
            say(f"tokenize: {len(left_out)} of {len(conversations)} conversations left out:")
            for line in left_out[:5]:
                say(f"  {line}")
        return examples

    def _examples(self, target: Target, conversation: Conversation) -> Iterator[Example]:
        tokenizer = target.tokenizer
        ids, mask = tokens_and_mask(tokenizer, conversation.messages, learn=self.learn)
        ends = end_ids(tokenizer) | set(target.eos_ids)
        plain = conversation.is_text or not tokenizer.chat_template
        stop = len(ids) if plain else self.max_tokens
        for number, start in enumerate(range(0, min(len(ids), stop), self.max_tokens)):
            tokens = ids[start : start + self.max_tokens]
            learn = mask[start : start + self.max_tokens]
            if not any(learn):
                raise ValueError(
                    f"its answer begins behind max_tokens={self.max_tokens}, so nothing would be "
                    "learned; allow more tokens."
                )
            # Behind the last end token only white space may follow: the example stops there.
            last = max(i for i, learned in enumerate(learn) if learned)
            tokens, learn = tokens[: last + 1], learn[: last + 1]
            reason = None if plain else ("eos" if tokens[-1] in ends else "length")
            if reason == "length" and len(ids) <= self.max_tokens:
                raise ValueError(
                    "the chat template writes no end token behind its answer, so a drafter would "
                    "never learn where answers stop; let the target answer (dataset.respond)."
                )
            yield Example(
                id=f"{conversation.id}+{number}" if number else conversation.id,
                tokens=torch.tensor(tokens),
                learn=torch.tensor(learn),
                category=conversation.category,
                finish_reason=reason,
            )
