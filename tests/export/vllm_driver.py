"""Runs inside the engine's environment: greedy text with a Medusa checkpoint, and what it drafted.

    python vllm_driver.py <target folder> <export folder or "none"> <heads> <output .safetensors>

Prints the generated ids as JSON on the last line. Writes every hidden state the proposer was given
and the tokens it drafted from it.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that the proposer can be watched
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
from vllm.v1.spec_decode.medusa import MedusaProposer  # type: ignore[import-not-found]

PROMPTS = ["The capital of France is", "def fib(n):\n    if n < 2:\n", "1 2 3 4 5 1 2 3 4 5 1 2"]

target, export, heads, out = sys.argv[1:]
seen: list[tuple[torch.Tensor, torch.Tensor]] = []
propose = MedusaProposer.propose


def watched(self, num_speculative_tokens, target_hidden_states, *args, **kwargs):
    """Keep what goes in and what comes out."""
    drafts = propose(self, num_speculative_tokens, target_hidden_states, *args, **kwargs)
    seen.append((target_hidden_states.clone(), drafts.clone()))
    return drafts


MedusaProposer.propose = watched
speculative = None
if export != "none":
    speculative = {"method": "medusa", "model": export, "num_speculative_tokens": int(heads)}
llm = LLM(
    model=target,
    dtype="float32",
    max_model_len=256,
    max_num_seqs=4,
    max_num_batched_tokens=256,
    enforce_eager=True,
    speculative_config=speculative,
)
sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
answers = llm.generate(PROMPTS, sampling, use_tqdm=False)
if seen:
    hidden, drafts = (torch.cat(part) for part in zip(*seen, strict=True))
    save_file({"hidden_Nd": hidden.contiguous(), "drafts_NK": drafts.contiguous()}, out)
sys.stdout.write("\n" + json.dumps([list(a.outputs[0].token_ids) for a in answers]) + "\n")
