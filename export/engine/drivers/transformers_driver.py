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

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig


@torch.inference_mode()
def decode(
    model: Any,
    assistant: Any,
    *,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """The answer to every prompt, with an assistant or (None) without."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(ends) or None, pad_token_id=ends[0] if ends else 0
    )
    found = []
    try:
        for prompt in prompts:
            begin = time.perf_counter()
            if assistant is None:
                tokens = _generate(model, prompt, max_new_tokens)
                rounds = [1] * (len(tokens) - 1)
            else:
                tokens, rounds = _assist(model, assistant, prompt, ends, max_new_tokens)
            seconds = time.perf_counter() - begin
            found.append(
                {"tokens": tokens, "steps": len(rounds), "rounds": rounds, "seconds": seconds}
            )
    finally:
        model.generation_config = kept
    return found


def _assist(
    model: Any, assistant: Any, prompt: list[int], ends: Sequence[int], max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """One answer from its second token on; the first is the target's."""
    first = _generate(model, prompt, 1)
    if first[0] in ends or max_new_tokens == 1:
        return first, []
    known = [*prompt, *first]
    with _roots(model, len(known) - 1) as roots:
        new = _generate(model, known, max_new_tokens - 1, assistant_model=assistant)
    stops = [*roots[1:], len(known) + len(new) - 1]
    return [*first, *new], [stop - root for root, stop in zip(roots, stops, strict=True)]


def _generate(model: Any, tokens: list[int], max_new_tokens: int, **more: Any) -> list[int]:
    tokens_1T = torch.tensor([tokens], device=model.device)
    out_1T = model.generate(
        tokens_1T,
        attention_mask=torch.ones_like(tokens_1T),
        max_new_tokens=max_new_tokens,
        **more,
    )
    return out_1T[0, len(tokens) :].tolist()


@contextmanager
def _roots(model: Any, first: int) -> Iterator[list[int]]:
    """The position of the root of every round, as the target's forwards are called."""
    roots: list[int] = []

    def note(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        roots.append(max(first, named["past_key_values"].get_seq_length()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield roots
    finally:
        handle.remove()


def main() -> None:
    """Read the request, write the answer."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    dtype = getattr(torch, asked["dtype"])
    model = AutoModelForCausalLM.from_pretrained(asked["target"], dtype=dtype).eval()
    assistant = None
    if asked["draft"] is not None:
        assistant = AutoModelForCausalLM.from_pretrained(asked["draft"], dtype=dtype).eval()
        knobs = assistant.generation_config
        knobs.num_assistant_tokens = asked["gamma"]
        knobs.num_assistant_tokens_schedule = "constant"
        knobs.assistant_confidence_threshold = 0.0
    answers = decode(
        model,
        assistant,
        prompts=asked["prompts"],
        ends=asked["ends"],
        max_new_tokens=asked["max_new_tokens"],
    )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    made = {"answers": answers, "counters": {}, "versions": versions}
    Path(sys.argv[2]).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
