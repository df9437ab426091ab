"""Greedy decoding with llama.cpp's server in this process (xllamacpp), one prompt at a time.

The server streams a message a token, with its timings so far: time, drafts and accepted drafts
change once a round, so that every round can be read off them. Three facts of it:

- It streams text. Tokens that end inside a character have no message of their own, so the ids are
  asked for again, all at once, where some are missing; their rounds are in the counts.
- Near the length limit it drafts what is left minus one, where our decoder drafts all and cuts:
  both last rounds count what is left.
- It ends an answer at every token that its vocabulary takes for an end (`<|im_end|>`,
  `<|endoftext|>`, ...), and at those we name. `ignore_eos` would forbid them to the target alone,
  and drafts of them would be refused.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

CACHE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def main() -> None:
    """Read the request, write the answer."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    server = _server(asked)
    _answer(server, asked, asked["prompts"][0])  # warm-up
    answers = [_answer(server, asked, prompt) for prompt in asked["prompts"]]
    made = {
        "answers": [{k: v for k, v in a.items() if k not in COUNTED} for a in answers],
        "counters": {name: sum(a[name] for a in answers) for name in COUNTED},
        "versions": {"xllamacpp": importlib.metadata.version("xllamacpp")},
    }
    Path(sys.argv[2]).write_text(json.dumps(made))


def _server(asked: dict):
    """One slot without prompt caches; keys and values in the precision asked for."""
    import xllamacpp as x  # type: ignore[import-not-found]

    cache = getattr(x.ggml_type, f"GGML_TYPE_{CACHE[asked['dtype']]}")
    longest = max(map(len, asked["prompts"])) + asked["max_new_tokens"] + asked["gamma"] + 8
    p = x.CommonParams()
    p.model.path = asked["target"]
    p.n_ctx = longest
    p.n_parallel = 1
    p.cpuparams.n_threads = len(os.sched_getaffinity(0))
    p.warmup = False
    p.verbosity = 1
    p.cache_ram_mib = 0
    p.cache_type_k = p.cache_type_v = cache
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if asked["draft"] is not None:
        kind = asked["options"]["type"].upper().replace("-", "_")
        p.speculative.types = [
            getattr(x.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")
        ]
        p.speculative.draft.mparams.path = asked["draft"]
        p.speculative.draft.n_max = asked["gamma"]
        p.speculative.draft.n_min = 0
        p.speculative.draft.p_min = 0.0
        p.speculative.draft.cache_type_k = p.speculative.draft.cache_type_v = cache
        p.speculative.draft.cpuparams.n_threads = len(os.sched_getaffinity(0))
    return x.Server(p)


COUNTED = ("draft_n", "draft_n_accepted", "predicted_n", "predicted_ms")
"""Of the server's timings, summed over the prompts."""


def _answer(server, asked: dict, prompt: list[int]) -> dict:
    """One prompt: its tokens, rounds and counts."""
    request = {
        "prompt": prompt,
        "n_predict": asked["max_new_tokens"],
        "temperature": 0.0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "return_tokens": True,
        "verbose": True,
    }
    messages: list[dict] = []

    def keep(message: dict) -> bool:
        messages.append(message)
        return False

    begin = time.perf_counter()
    server.handle_completions({**request, "stream": True, "timings_per_token": True}, keep)
    seconds = time.perf_counter() - begin
    if not messages or "__verbose" not in messages[-1]:
        raise RuntimeError(f"llama.cpp answered {messages[-1:]} to a prompt of {len(prompt)}.")
    tokens = [token for m in messages for token in m["__verbose"]["tokens"]]
    last = messages[-1]
    if len(tokens) != last["timings"]["predicted_n"]:
        whole: list[dict] = []
        server.handle_completions(request, lambda message: bool(whole.append(message)))
        tokens = whole[-1]["__verbose"]["tokens"]
        assert len(tokens) == last["timings"]["predicted_n"], "the same answer twice"
    end = next((i for i, token in enumerate(tokens) if token in asked["ends"]), len(tokens) - 1)
    tokens = tokens[: end + 1]
    rounds = rounds_of([m["timings"] for m in messages], asked["gamma"], len(tokens) - 1)
    counts = {name: last["timings"].get(name, 0) for name in COUNTED}
    shown = {"tokens": tokens, "steps": len(rounds), "rounds": rounds, "seconds": seconds}
    return {**shown, **counts}


def rounds_of(timings: list[dict], gamma: int, produced: int) -> list[int]:
    """Tokens of every round after the first token, cut to what the answer has of them.

    A round whose tokens all end inside a character has no message: it is seen in the drafts of the
    next one, which are then those of two, and its tokens are counted as one.
    """
    rounds: list[int] = []
    before = timings[0]
    for now in timings[1:]:
        if now["predicted_ms"] == before["predicted_ms"]:
            continue
        drafted = now.get("draft_n", 0) - before.get("draft_n", 0)
        accepted = now.get("draft_n_accepted", 0) - before.get("draft_n_accepted", 0)
        hidden = max(0, -(-drafted // max(1, gamma)) - 1)
        rounds += [1] * hidden + [accepted + 1]
        before = now
    while sum(rounds) > produced:
        over = sum(rounds) - produced
        rounds[-1] -= min(over, rounds[-1])
        if not rounds[-1]:
            rounds.pop()
    if sum(rounds) < produced:
        raise RuntimeError(f"llama.cpp's timings show {sum(rounds)} of {produced} tokens.")
    return rounds


if __name__ == "__main__":
    main()
