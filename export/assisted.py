"""Greedy assisted generation of transformers, counted like the reference decoder counts.

What `model.generate(assistant_model=...)` does differently, and what is done about it:

- It drafts before the target has read the prompt: its first forward reads the prompt and the drafts
  together, so that its rounds start one token earlier than ours (root x_{T-1} instead of x_T). Here
  it gets the prompt *and* the target's first token; every forward is then one round, from the same
  roots as ours, and the first one also reads the prompt.
- Near the length limit it drafts fewer tokens (what is left, minus one). The tokens it may keep are
  the same; ours keeps them all and cuts afterwards. Both last rounds count what is left after the
  cut, so rounds are equal one by one.
- It stops a draft at an end-of-answer token. What we draft behind one is never kept.
- The assistant has a cache of its own, cut to the verified tokens but one after every round, which
  gives the drafts that a fresh reading of the text would.
- Settings in the target's generation_config (a repetition penalty) change what greedy means. They
  are set aside: the target's argmax is asked for.

The rounds are read from a hook on the target's forward: with P tokens in the cache the root of the
round stands at position P (in the first round at the prompt's end), and the distance of two roots
is the number of tokens produced.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from transformers import GenerationConfig

from conf.console import console
from data_prep.prompts import Prompt
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.greedy import Greedy
from export.served import Answer, Served, served
from models.drafter.base import Drafter
from models.target import Target


@torch.inference_mode()
def decode_assisted(
    *,
    assistant: Any,
    drafter: Drafter,
    target: Target,
    prompts: Sequence[Prompt],
    gamma: int,
    max_new_tokens: int,
) -> Served:
    """Decode every prompt three times: the target alone, assisted, and with our own decoder."""
    decoder = Decoder(target=target, drafter=drafter, verifier=Greedy(), policy=Chain(gamma=gamma))
    alone, answers, reference = [], [], []
    with _neutral(target):
        for prompt in track(prompts, "Decoding with transformers", console=console, transient=True):
            plain = _generate(target, prompt.tokens, max_new_tokens)
            alone.append(plain)
            answers.append(_assist(target, assistant, prompt.tokens, plain, max_new_tokens))
            made = decoder.generate(prompt.tokens, max_new_tokens=max_new_tokens)
            rounds = [r.produced for r in made.rounds]
            reference.append(Answer(made.tokens, _cut(rounds, len(made.tokens) - 1)))
    return served(
        engine="transformers assisted generation",
        alone=alone,
        answers=answers,
        reference=reference,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        dtype=str(target.dtype).removeprefix("torch."),
    )


def _assist(
    target: Target, assistant: Any, prompt: list[int], plain: list[int], max_new_tokens: int
) -> Answer:
    """One answer from its second token on; the first is the target's."""
    if plain[0] in target.eos_ids or max_new_tokens == 1:
        return Answer(plain[:1], [])
    known = [*prompt, plain[0]]
    with _roots(target, len(known) - 1) as roots:
        new = _generate(target, known, max_new_tokens - 1, assistant_model=assistant)
    ends = [*roots[1:], len(known) + len(new) - 1]
    return Answer([plain[0], *new], [end - root for root, end in zip(roots, ends, strict=True)])


def _generate(target: Target, tokens: list[int], max_new_tokens: int, **more: Any) -> list[int]:
    tokens_1T = torch.tensor([tokens], device=target.device)
    out_1T = target.model.generate(
        tokens_1T,
        attention_mask=torch.ones_like(tokens_1T),
        max_new_tokens=max_new_tokens,
        **more,
    )
    return out_1T[0, len(tokens) :].tolist()


@contextmanager
def _roots(target: Target, first: int) -> Iterator[list[int]]:
    """The position of the root of every round, as the target's forwards are called."""
    roots: list[int] = []

    def note(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        roots.append(max(first, named["past_key_values"].get_seq_length()))

    handle = target.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield roots
    finally:
        handle.remove()


@contextmanager
def _neutral(target: Target) -> Iterator[None]:
    """Greedy decoding as the argmax of the target's logits, until every end-of-answer token."""
    kept = target.model.generation_config
    ends = list(target.eos_ids)
    target.model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    try:
        yield
    finally:
        target.model.generation_config = kept


def _cut(rounds: list[int], total: int) -> list[int]:
    """The last round without what the length limit cut off."""
    return [*rounds[:-1], total - sum(rounds[:-1])] if rounds else []
