"""Runs inside the engine's environment: what vLLM feeds an EAGLE-3 drafter for one prompt.

    python vllm_features.py <request .json> <output .safetensors>

The request is that of export/engine/drivers/vllm_driver.py, with one prompt. Writes the input of
the drafter's `fc` for the prompt's positions, layers side by side.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
from vllm.model_executor.models.llama_eagle3 import (  # type: ignore[import-not-found]
    Eagle3LlamaForCausalLM,
)

asked = json.loads(Path(sys.argv[1]).read_text())
seen: list[torch.Tensor] = []
combine = Eagle3LlamaForCausalLM.combine_hidden_states


def watched(self, hidden_states):
    """Keep what goes in."""
    seen.append(hidden_states.detach().float().clone())
    return combine(self, hidden_states)


Eagle3LlamaForCausalLM.combine_hidden_states = watched
llm = LLM(
    model=asked["target"],
    dtype="float32",
    max_model_len=256,
    max_num_seqs=1,
    max_num_batched_tokens=256,
    enforce_eager=True,
    speculative_config={
        **asked["options"],
        "model": asked["draft"],
        "num_speculative_tokens": asked["gamma"],
    },
)
seen.clear()  # the engine's own trial runs
(prompt,) = asked["prompts"]
llm.generate(
    [{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
)
save_file({"features": seen[0][: len(prompt)].contiguous()}, sys.argv[2])
