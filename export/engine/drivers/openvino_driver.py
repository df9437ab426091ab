"""Greedy decoding with OpenVINO GenAI, one prompt at a time.

The pipeline hands its streamer the new tokens once a step: the first time the prompt's one token,
then those of every round. Prompts are token ids, so no chat template is applied and nothing is
added. An accepted path that goes beyond the end of the answer is cut, as our decoder cuts it.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino_genai as genai  # type: ignore[import-not-found]
from openvino import Tensor  # type: ignore

HINTS = {
    "float32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
}


class Steps(genai.StreamerBase):
    """The tokens of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def write(self, tokens):
        """Called once a step."""
        self.seen.append(list(tokens) if isinstance(tokens, list) else [tokens])
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back."""


def main() -> None:
    """Read the request, write the answer."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    hints = HINTS[asked["dtype"]]
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = False
    longest = max(map(len, asked["prompts"])) + asked["max_new_tokens"]
    scheduler.max_num_batched_tokens = max(256, longest)  # a prompt is one step
    more = {}
    if asked["draft"] is not None:
        more["draft_model"] = genai.draft_model(asked["draft"], "CPU", **hints)
    pipe = genai.LLMPipeline(asked["target"], "CPU", scheduler_config=scheduler, **more, **hints)
    _answer(pipe, asked, asked["prompts"][0])  # warm-up
    found = [_answer(pipe, asked, prompt) for prompt in asked["prompts"]]
    made = {
        "answers": [answer for answer, _ in found],
        "counters": {"accepted_tokens": sum(accepted for _, accepted in found)},
        "versions": {name: version(name) for name in ("openvino-genai", "optimum-intel")},
    }
    Path(sys.argv[2]).write_text(json.dumps(made))


def _answer(pipe, asked: dict, prompt: list[int]) -> tuple[dict, int]:
    """One prompt, and the engine's own count of accepted drafts."""
    config = genai.GenerationConfig()
    config.max_new_tokens = asked["max_new_tokens"]
    config.do_sample = False
    config.apply_chat_template = False
    if asked["ends"]:
        config.eos_token_id = asked["ends"][0]
        config.stop_token_ids = set(asked["ends"])
    else:
        config.ignore_eos = True
    if asked["draft"] is not None:
        config.num_assistant_tokens = asked["gamma"]
    steps = Steps()
    begin = time.perf_counter()
    result = pipe.generate(Tensor(np.array([prompt], dtype=np.int64)), config, steps)
    seconds = time.perf_counter() - begin
    tokens = list(result.tokens[0])
    rounds = [len(step) for step in steps.seen if step]
    if rounds[:1] != [1]:
        raise RuntimeError(f"OpenVINO's first step gave {rounds[:1]} tokens, expected one.")
    rounds = rounds[1:]
    over = sum(rounds) - (len(tokens) - 1)
    if over < 0 or (over and over >= rounds[-1]):
        raise RuntimeError(f"OpenVINO streamed {sum(rounds) + 1} tokens and answers {len(tokens)}.")
    if over:
        rounds[-1] -= over
    accepted = 0
    if asked["draft"] is not None:
        accepted = result.extended_perf_metrics.get_num_accepted_tokens()
    answer = {"tokens": tokens, "steps": len(rounds), "rounds": rounds, "seconds": seconds}
    return answer, accepted


if __name__ == "__main__":
    main()
