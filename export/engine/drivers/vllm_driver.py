"""Greedy decoding with vLLM, one prompt at a time, every engine step watched.

Prompts are given as token ids, alone in the batch, without prefix caching; scheduling is
synchronous, so that one step of the engine is one forward of the target. The first step reads the
prompt and gives one token (long prompts take several, which give none); each later step is a round,
and the tokens it returns are what the round produced. vLLM drafts whole chains at the length limit
and cuts afterwards, as our decoder does. The engine is eager: compiled kernels round otherwise.

Its own counters (`vllm:spec_decode_*`) count a cut round's drafts whole.
"""

import json
import sys
import time
from pathlib import Path

import torch
from vllm import LLM, __version__  # type: ignore[import-not-found]
from vllm.sampling_params import (  # type: ignore[import-not-found]
    RequestOutputKind,
    SamplingParams,
)


def main() -> None:
    """Read the request, write the answer."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    speculative = None
    if asked["draft"] is not None:
        speculative = {
            **asked["options"],
            "model": asked["draft"],
            "num_speculative_tokens": asked["gamma"],
        }
    longest = max(map(len, asked["prompts"])) + asked["max_new_tokens"] + asked["gamma"] + 8
    llm = LLM(
        model=asked["target"],
        dtype=asked["dtype"],
        max_model_len=longest,
        max_num_seqs=1,
        max_num_batched_tokens=max(longest, 512),
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        disable_log_stats=False,
        speculative_config=speculative,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=asked["max_new_tokens"],
        ignore_eos=True,  # the ends that we were given, and no other
        stop_token_ids=asked["ends"],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    _answer(llm, "warm-up", asked["prompts"][0], sampling)
    before = _counters(llm)
    answers = [_answer(llm, str(i), p, sampling) for i, p in enumerate(asked["prompts"])]
    made = {
        "answers": answers,
        "counters": _difference(_counters(llm), before),
        "versions": {"vllm": __version__, "torch": torch.__version__},
    }
    Path(sys.argv[2]).write_text(json.dumps(made))


def _answer(llm, name: str, prompt: list[int], sampling: SamplingParams) -> dict:
    """One prompt through the engine, step by step."""
    engine = llm.llm_engine
    begin = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling.clone())
    tokens, rounds = [], []
    while engine.has_unfinished_requests():
        for output in engine.step():
            new = list(output.outputs[0].token_ids)
            if not new:
                continue
            if tokens:
                rounds.append(len(new))
            else:
                # The step that ends the prompt gives one token.
                assert len(new) == 1, new
            tokens += new
    seconds = time.perf_counter() - begin
    return {"tokens": tokens, "steps": len(rounds), "rounds": rounds, "seconds": seconds}


def _counters(llm) -> dict:
    """Counts by their last word; per position a list."""
    found = {}
    for metric in llm.get_metrics():
        if "spec_decode" in metric.name:
            value = getattr(metric, "value", None)
            name = metric.name.removeprefix("vllm:spec_decode_num_")
            found[name] = list(metric.values) if value is None else value
    return found


def _difference(now: dict, before: dict) -> dict:
    return {
        name: [a - b for a, b in zip(value, before[name], strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in now.items()
    }


if __name__ == "__main__":
    main()
