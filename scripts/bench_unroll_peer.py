"""A training step of the speculators library's EAGLE-3; runs in an environment that has it.

Called by scripts.bench_unroll with --peer, one case a process. The model has the shape, draft
vocabulary, unrolled steps and loss (forward KL, positions to learn, own head trained) of ours, sdpa
attention and bf16 autocast, as its trainer runs it without an accelerator; forward, backward,
clipping and AdamW on given features are timed.

Shape legend: T positions, d hidden size.
"""

import argparse
import json
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from scripts.peak import measured, multiplications


def prepare(case: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """The library's model and one batch; what runs returns the gradients."""
    from speculators.losses import resolve_loss_config  # type: ignore[import-not-found]
    from speculators.models.eagle3 import (  # type: ignore[import-not-found]
        Eagle3DraftModel,
        Eagle3SpeculatorConfig,
    )

    torch.manual_seed(0)
    T, d, vocab = case["positions"], case["hidden"], case["vocab"]
    shape = LlamaConfig(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=d * 8 // 3,
        num_hidden_layers=1,
        num_attention_heads=max(1, d // 64),
        num_key_value_heads=max(1, d // 192),
        max_position_embeddings=8192,
    )
    shape._attn_implementation = "sdpa"
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(
            transformer_layer_config=shape,
            draft_vocab_size=case["draft_vocab"],
            eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        )
    )
    for module in (model.embed_tokens, model.lm_head, model.verifier_lm_head):
        nn.init.normal_(module.weight, std=0.02)  # they wait for a target's weights as NaN
    model.lm_head.weight.requires_grad_(True)
    model.train()
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()

    bf16 = torch.bfloat16
    given: dict[str, Tensor] = {
        "hidden_states": torch.randn(1, T, 3 * d, dtype=bf16),
        "input_ids": torch.randint(0, vocab, (1, T)),
        "document_ids": torch.zeros(1, T, dtype=torch.long),
        "loss_mask": torch.tensor([learned(case)]),
        "verifier_last_hidden_states": torch.randn(1, T, d, dtype=bf16),
    }
    loss = resolve_loss_config("kl_div", implementation="eager")

    def once() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", bf16):
            _, total, _ = model(
                **given, ttt_steps=case["steps"], ttt_step_loss_decay=0.8, loss_config=loss
            )
        total.backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        return [weight.grad for weight in weights if weight.grad is not None]

    return once


def learned(case: dict[str, Any]) -> list[bool]:
    """Positions to learn, as scripts.bench_unroll has them."""
    prompt, answer = case["turns"] or (0, 1)
    return [t % (prompt + answer) >= prompt for t in range(case["positions"])]


def main() -> None:
    """One case as JSON in, its figures as JSON out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=json.loads)
    case = parser.parse_args().case
    small = {"steps": case["steps"], "positions": 64, "vocab": 512, "draft_vocab": 256}
    small |= {"turns": None}
    prepare(case | small)()
    once = prepare(case)
    found = measured(once, "cpu", case["repeats"])
    found["gflop"] = multiplications(once)
    found["tokens_per_second"] = case["positions"] / found["seconds"]
    found["process_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps(found))


if __name__ == "__main__":
    main()
