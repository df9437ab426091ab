"""Rendered prompts, for benchmarks and for the target to answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from conf.console import say
from data_prep.chat import prompt_tokens
from data_prep.conversation import spread
from data_prep.source import Source


@dataclass(frozen=True)
class Prompt:
    """Token ids that end where the assistant starts to write."""

    id: str
    tokens: list[int]
    category: str


def read_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """The first user turn of every conversation, rendered; plain text has none and is refused.

    `limit` draws that many, spread evenly over all sources. A prompt longer than
    `max_prompt_tokens` is left out and counted aloud. A conversation without a category gets its
    source's name.
    """
    prompts: dict[str, Prompt] = {}
    too_long = 0
    for source in sources:
        for conversation in source.read():
            tokens = prompt_tokens(tokenizer, conversation.prompt())
            if max_prompt_tokens is not None and len(tokens) > max_prompt_tokens:
                too_long += 1
                continue
            if conversation.id in prompts:
                raise ValueError(
                    f"Two sources both call a record '{conversation.id}'; give one of the files "
                    "another name (source.name), because reports tell prompts apart by it."
                )
            prompts[conversation.id] = Prompt(conversation.id, tokens, conversation.label)
    if too_long:
        say(f"{too_long} prompts of more than {max_prompt_tokens} tokens are left out.")
    if not prompts:
        raise ValueError(
            f"No prompt is left to measure with: {too_long} were longer than "
            f"max_prompt_tokens={max_prompt_tokens}; allow longer ones, or add sources."
        )
    return spread(list(prompts.values()), limit)
