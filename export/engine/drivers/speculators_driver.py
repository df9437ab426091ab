"""Logits of an EAGLE-3 folder as the speculators library computes them.

Asked: `draft`, a folder; `seen`, a safetensors file with features [T, 3d] and the tokens after them
[T]. Answered: `logits` in a safetensors file named by the request. One step, no speculation: row t
reads the features of position t and token t+1.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel  # type: ignore[import-not-found]


def main() -> None:
    """Read the request, write the answer."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    seen = load_file(asked["seen"])
    model = SpeculatorModel.from_pretrained(asked["draft"], dtype=torch.float32)
    model.load_verifier_weights()
    model = model.float().eval()
    kept = []
    model.lm_head.register_forward_hook(lambda *seen: kept.append(seen[-1]))
    tokens_1T = seen["tokens_T"][None]
    with torch.inference_mode():
        model(
            hidden_states=seen["features_Te"][None],
            input_ids=tokens_1T,
            document_ids=torch.zeros_like(tokens_1T),
            ttt_steps=1,
        )
    save_file({"logits_TD": kept[0][0].contiguous()}, asked["logits"])
    Path(sys.argv[2]).write_text(json.dumps({"versions": {"speculators": version("speculators")}}))


if __name__ == "__main__":
    main()
