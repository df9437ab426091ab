"""Our own format, ready for the Hugging Face Hub: config.json and model.safetensors.

config.json holds the class and its constructor's arguments, and describes an acceptance head where
there is one (its weights are acceptance.safetensors). Nothing of the target is stored: a
drafter is bound to it when loaded.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from decode.tree.chain import Chain
from export.base import UNLIMITED, Exporter, Reader
from export.tensors import shape_problems, tensor_problems, vocabulary_problems
from models.acceptance import KEY, WEIGHTS, AcceptanceHead
from models.drafter.base import Drafter
from models.drafter.load import drafter_class, load_drafter
from models.target import Features, Target


class HfExporter(Exporter):
    """The drafter as `python -m decode` and `models.drafter.load` read it."""

    name = "hf"
    engine = "Draftsmith's reference decoder"

    def refuse(self, drafter: Drafter) -> None:
        """Every family can be written."""

    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        drafter.save_pretrained(folder)

    def read(self, folder: Path, target: Target) -> Reader:
        return DrafterReader(load_drafter(folder, target).to(target.dtype))

    def usage(self, *, target: str, depths: int) -> str:
        return f"""The folder is loaded with Draftsmith and bound to its target:

```python
from models.drafter.load import load_drafter
from models.target import load_target

target = load_target(name="{target}")
drafter = load_drafter("path/to/this/folder", target)  # drafts up to {depths} tokens
```"""


class DrafterReader:
    """A drafter of ours, asked for its greedy chain."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        state = self.drafter.start(features, tokens_1T)
        gamma = self.drafter.max_depth or UNLIMITED
        tree = self.drafter.propose(state, tokens_1T[0, -1], Chain(gamma=gamma))
        return tree.tokens_N[1:].tolist()


def problems(folder: Path) -> list[str]:
    """What is wrong with a folder in this format."""
    family, arguments = drafter_class(folder)
    with torch.device("meta"):
        empty = family(**arguments)
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    file = folder / "model.safetensors"
    found = tensor_problems(folder, expected) + _head_problems(folder)
    if found or "draft_ids_D" not in expected:
        return found
    with safe_open(file, framework="pt") as reader:
        ids = reader.get_tensor("draft_ids_D").tolist()
    return vocabulary_problems(ids, arguments["vocab_size"])


def _head_problems(folder: Path) -> list[str]:
    """What is wrong with the acceptance head that config.json describes, if it does."""
    described = json.loads((folder / "config.json").read_text()).get(KEY)
    if described is None:
        return []
    with torch.device("meta"):
        empty = AcceptanceHead(**described)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    file = folder / WEIGHTS
    if not file.is_file():
        return [f"{WEIGHTS} is missing, which config.json describes"]
    with safe_open(file, framework="pt") as reader:
        found = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
    return [f"{WEIGHTS}: {problem}" for problem in shape_problems(found, shapes)]


def is_mine(folder: Path) -> bool:
    """Whether config.json is in this format."""
    return "_target_" in json.loads((folder / "config.json").read_text())
