"""Losses and gradients of a training step of the speculators library; runs in its environment.

Asked: `draft`, a folder; `seen`, a safetensors file with features [T, 3d], the tokens and the
target's normed states one position later, and which of them count; `steps`. Answered: the mean loss
of every unrolled step, and, in `gradients`, what the sum of these means gives the weights.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel  # type: ignore[import-not-found]
from speculators.losses import resolve_loss_config  # type: ignore[import-not-found]
from speculators.models.eagle3 import Eagle3SpeculatorConfig  # type: ignore[import-not-found]


def main() -> None:
    """Read the request, write the answer."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    seen = load_file(asked["seen"])
    config = Eagle3SpeculatorConfig.from_pretrained(asked["draft"])
    config.transformer_layer_config._attn_implementation = "sdpa"  # flex trains on GPUs only
    model = SpeculatorModel.from_pretrained(asked["draft"], config=config, dtype=torch.float32)
    model.load_verifier_weights()
    model = model.float().train()
    model.verifier_norm = torch.nn.Identity()  # the states given are normed already
    model.lm_head.weight.requires_grad_(True)
    tokens_1T = seen["tokens_T"][None]
    _, total, numbers = model(
        hidden_states=seen["features_Te"][None],
        input_ids=tokens_1T,
        document_ids=torch.zeros_like(tokens_1T),
        loss_mask=seen["counts_T"].bool()[None],
        verifier_last_hidden_states=seen["final_Td"][None],
        ttt_steps=asked["steps"],
        ttt_step_loss_decay=1.0,
        loss_config=resolve_loss_config("kl_div", implementation="eager"),
    )
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    save_file(gradients, asked["gradients"])
    means = [float(numbers[f"loss_{k}_sum"]) for k in range(asked["steps"])]
    answer = {"losses": means, "versions": {"speculators": version("speculators")}}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
