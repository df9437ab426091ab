"""Medusa heads under the names of the original code, which TGI and TensorRT-LLM read too.

    {i}.{j}.linear.weight, .bias     block j of head i: y <- y + SiLU(A y + a)
    {i}.{layers}.weight              U_i over the whole vocabulary, no bias

One file: medusa_lm_head.safetensors for TGI, medusa_lm_head.pt (a torch file of plain tensors,
which loads with weights_only) for the other two.

Shape legend: d hidden size, V target vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from export.base import Reader
from export.formats.base import Format, head_complaint, plain, read_config
from export.formats.medusa import assemble, num_layers, wide_rows
from export.tensors import load_tensors, tensor_problems, weight_files
from models.drafter.base import Drafter
from models.drafter.medusa import Medusa
from models.target import Features, Target


class MedusaHeads(Format):
    """Base of the two files."""

    families = (Medusa,)
    all_depths = True
    file: str

    def complaint(self, drafter: Drafter) -> str | None:
        return head_complaint(drafter)

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, Medusa)
        layers = num_layers(drafter)
        config = {
            "medusa_num_heads": drafter.num_depths,
            "medusa_num_layers": layers,
            "base_model_name_or_path": drafter.target.name,
            "hidden_size": drafter.hidden_size,
            "vocab_size": drafter.vocab_size,
        }
        tensors: dict[str, Tensor] = {}
        for i, block in enumerate(drafter.blocks):
            tensors |= {f"{i}.{name}": t for name, t in block.state_dict().items()}
            tensors[f"{i}.{layers}.weight"] = wide_rows(drafter, i)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = plain(tensors, drafter.dtype)
        if self.file.endswith(".pt"):
            torch.save(tensors, folder / self.file)
        else:
            save_file(tensors, str(folder / self.file), metadata={"format": "pt"})

    def read(self, folder: Path, target: Target) -> Reader:
        return MedusaHeadsCheckpoint(folder, target.device)

    def is_mine(self, folder: Path) -> bool:
        config = read_config(folder)
        return "medusa_num_heads" in config and weight_files(folder)[0].name == self.file

    def problems(self, folder: Path) -> list[str]:
        config = read_config(folder)
        keys = ("medusa_num_heads", "medusa_num_layers", "base_model_name_or_path")
        found = [f"config.json has no '{key}'" for key in keys if key not in config]
        if "architectures" in config:
            found.append(
                "config.json names architectures, by which TGI takes the folder for a target"
            )
        if len(found) and any("medusa_num" in p for p in found):
            return found
        shapes = {n: tuple(t.shape) for n, t in _tensors(folder).items()}
        heads, layers = int(config["medusa_num_heads"]), int(config["medusa_num_layers"])
        if f"0.{layers}.weight" not in shapes:
            return [*found, f"tensor '0.{layers}.weight' is missing"]
        vocab, d = shapes[f"0.{layers}.weight"]
        expected: dict[str, tuple[int, ...]] = {}
        for i in range(heads):
            for j in range(layers):
                expected |= {f"{i}.{j}.linear.weight": (d, d), f"{i}.{j}.linear.bias": (d,)}
            expected[f"{i}.{layers}.weight"] = (vocab, d)
        return found + tensor_problems(folder, expected)

    def load(self, folder: Path, target: Target) -> Drafter:
        """As many heads as the file has: published configs name fewer."""
        tensors, layers = load_tensors(folder), int(read_config(folder)["medusa_num_layers"])
        heads = 1 + max(int(name.partition(".")[0]) for name in tensors)
        return assemble(tensors, heads, layers, target, [])


class TgiMedusa(MedusaHeads):
    """For TGI."""

    name = "medusa (TGI)"
    file = "medusa_lm_head.safetensors"


class OriginalMedusa(MedusaHeads):
    """For the original code and TensorRT-LLM."""

    name = "medusa (original)"
    file = "medusa_lm_head.pt"

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, Medusa)
        if num_layers(drafter) > 1:
            return (
                f"This drafter's heads have {num_layers(drafter)} blocks with weights of their "
                "own, and the original Medusa repeats one block; train with drafter.num_layers=1."
            )
        return super().complaint(drafter)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors, or none where the file is missing (which is reported with the tensors)."""
    return load_tensors(folder) if weight_files(folder)[0].is_file() else {}


class MedusaHeadsCheckpoint:
    """A reader of the format in a few lines of torch."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.config = read_config(folder)
        self.tensors = {n: t.to(device).float() for n, t in load_tensors(folder).items()}

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Head i, from f_t alone (t = T-2), predicts x_{t+2+i}."""
        layers = self.config["medusa_num_layers"]
        drafted = []
        for i in range(self.config["medusa_num_heads"]):
            y_d = features.final_BTd[0, -1].float()
            for j in range(layers):
                block = f"{i}.{j}.linear"
                a, bias = self.tensors[f"{block}.weight"], self.tensors[f"{block}.bias"]
                y_d = y_d + F.silu(F.linear(y_d, a, bias))
            drafted.append(int((self.tensors[f"{i}.{layers}.weight"] @ y_d).argmax()))
        return drafted
