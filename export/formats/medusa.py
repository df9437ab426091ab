"""Medusa heads in the format that vLLM reads (up to 0.32, which was the last to have the method).

Written after what vLLM 0.32 loads, not after its description:
    blocks.{i}.layers.{l}.weight, .bias   y <- y + SiLU(A y + a), layer by layer; i is the depth
    lm_heads.{i}.weight                   logits_i = U_i y, no bias; the engine takes the argmax
With `original_lm_head` in config.json there is only lm_heads.0, shared by all depths.

Three facts of that loader shape what is written here.
- `medusa_fc_bias` must be true in config.json, or the biases of the blocks are dropped in silence.
- A reduced vocabulary (`token_map`) is described there but cannot be loaded: a head per depth must
  have vocab_size rows, and with a shared head the check for unloaded weights trips over the map. So
  a head over a reduced vocabulary is widened to the whole one: every row outside it is the mean of
  the rows inside. Its logit is then the mean of the draft logits, which is never above their
  maximum, so the argmax, and with it every draft, stays the same. The engine pays for all rows.
- It drafts with every head at once: `num_speculative_tokens` is the number of heads.

Shape legend: d hidden size, V target vocabulary, D draft vocabulary, T positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.base import Reader
from export.formats.base import (
    Format,
    floats,
    head_complaint,
    head_rows,
    read_config,
    write_files,
)
from export.formats.importing import fill
from export.tensors import load_tensors, tensor_problems
from models.drafter.base import Drafter
from models.drafter.medusa import Medusa
from models.head.frozen import FrozenHead
from models.target import Features, Target

OWN = {"_target_": "models.head.own.OwnHead"}


class MedusaFormat(Format):
    """vLLM's spelling."""

    name = "medusa"
    families = (Medusa,)
    all_depths = True

    def complaint(self, drafter: Drafter) -> str | None:
        return head_complaint(drafter)

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, Medusa)
        tensors: dict[str, Tensor] = {}
        for i, block in enumerate(drafter.blocks):
            for name, tensor in block.state_dict().items():
                layer, _, kind = name.replace(".linear", "").partition(".")
                tensors[f"blocks.{i}.layers.{layer}.{kind}"] = tensor
        config: dict[str, Any] = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": drafter.hidden_size,
            "vocab_size": drafter.vocab_size,
            "num_heads": drafter.num_depths,
            "num_hidden_layers": num_layers(drafter),
            "medusa_fc_bias": True,
            "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        }
        shared = isinstance(drafter.head(0), FrozenHead)
        for i in range(1 if shared else drafter.num_depths):
            tensors[f"lm_heads.{i}.weight"] = wide_rows(drafter, i)
        if shared:
            config["original_lm_head"] = True
        write_files(folder, config, tensors, drafter.dtype)

    def read(self, folder: Path, target: Target) -> Reader:
        return MedusaCheckpoint(folder, target.device)

    def is_mine(self, folder: Path) -> bool:
        return read_config(folder).get("model_type") == "medusa"

    def problems(self, folder: Path) -> list[str]:
        config = read_config(folder)
        keys = ("hidden_size", "vocab_size", "num_heads", "num_hidden_layers")
        absent = [f"config.json has no '{key}'" for key in keys if key not in config]
        if absent:
            return absent
        d, vocab, heads, layers = (int(config[key]) for key in keys)
        found = []
        if config.get("architectures") != ["MedusaModel"]:
            found.append(
                f"architectures is {config.get('architectures')}, expected ['MedusaModel']"
            )
        if config.get("truncated_vocab_size", vocab) != vocab:
            found.append(
                "truncated_vocab_size is set, but the engine cannot load a reduced vocabulary"
            )
        expected: dict[str, tuple[int, ...]] = {}
        for i in range(heads):
            for layer in range(layers):
                expected[f"blocks.{i}.layers.{layer}.weight"] = (d, d)
                if config.get("medusa_fc_bias", False):
                    expected[f"blocks.{i}.layers.{layer}.bias"] = (d,)
            if i == 0 or not config.get("original_lm_head", False):
                expected[f"lm_heads.{i}.weight"] = (vocab, d)
        return found + tensor_problems(folder, expected)

    def load(self, folder: Path, target: Target) -> Drafter:
        """Heads over the whole vocabulary; a shared head is given to every depth."""
        config, tensors = read_config(folder), load_tensors(folder)
        heads, layers = int(config["num_heads"]), int(config["num_hidden_layers"])
        renamed: dict[str, Tensor] = {}
        for i in range(heads):
            for j in range(layers):
                base = f"blocks.{i}.layers.{j}"
                renamed[f"{i}.{j}.linear.weight"] = weight = tensors.pop(f"{base}.weight")
                zeros = torch.zeros_like(weight[0])
                bias = tensors.pop(f"{base}.bias", zeros)
                renamed[f"{i}.{j}.linear.bias"] = bias if config.get("medusa_fc_bias") else zeros
            row = 0 if config.get("original_lm_head") else i
            renamed[f"{i}.{layers}.weight"] = tensors[f"lm_heads.{row}.weight"]
        strays = [name for name in tensors if not name.startswith("lm_heads.")]
        return assemble(renamed, heads, layers, target, strays)


def num_layers(drafter: Medusa) -> int:
    """Residual blocks of each head."""
    return len(drafter.blocks[0])  # type: ignore[arg-type]


def wide_rows(drafter: Drafter, depth: int) -> Tensor:
    """U of a depth over the whole vocabulary, rows outside the draft vocabulary never winning."""
    return widen_by_mean(head_rows(drafter, depth), drafter.draft_ids_D, drafter.vocab_size)


def widen_by_mean(weight_Dd: Tensor, ids_D: Tensor | None, vocab_size: int) -> Tensor:
    """Rows of a draft vocabulary in their places, the mean of them everywhere else."""
    if ids_D is None:
        return weight_Dd
    wide_Vd = weight_Dd.float().mean(0).to(weight_Dd.dtype).repeat(vocab_size, 1)
    wide_Vd[ids_D] = weight_Dd
    return wide_Vd


def assemble(
    tensors: dict[str, Tensor], heads: int, layers: int, target: Target, strays: list[str]
) -> Drafter:
    """Medusa of tensors under the original names: `{i}.{j}.linear.*` and `{i}.{layers}.weight`."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        i, _, rest = name.partition(".")
        if rest == f"{layers}.weight":
            weights[f"heads.{i}.linear.weight"] = tensor
        else:
            weights[f"blocks.{i}.{rest}"] = tensor
    drafter = Medusa(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_heads=heads,
        num_layers=layers,
        head=OWN,
    )
    return fill(drafter, weights, strays, target)


class MedusaCheckpoint:
    """A reader of the format as the engine's source describes it, in a few lines of torch."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.config, self.tensors = read_config(folder), floats(folder, device)

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Head i, from f_t alone (t = T-2), predicts x_{t+2+i}."""
        shared = self.config.get("original_lm_head", False)
        drafted = []
        for i in range(self.config["num_heads"]):
            y_d = features.final_BTd[0, -1].float()
            for layer in range(self.config["num_hidden_layers"]):
                a = self.tensors[f"blocks.{i}.layers.{layer}.weight"]
                bias = None
                if self.config.get("medusa_fc_bias", False):
                    bias = self.tensors[f"blocks.{i}.layers.{layer}.bias"]
                y_d = y_d + F.silu(F.linear(y_d, a, bias))
            head = self.tensors[f"lm_heads.{0 if shared else i}.weight"]
            drafted.append(int((head @ y_d).argmax()))
        return drafted
