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

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from export.base import Exporter, Reader
from export.tensors import tensor_problems
from models.drafter.base import Drafter
from models.drafter.medusa import Medusa
from models.head.frozen import FrozenHead
from models.head.own import OwnHead
from models.target import PACKAGE_PREFIX, Features, Target

OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")


class VllmExporter(Exporter):
    """Medusa for vLLM 0.32 and older."""

    name = "vllm"
    engine = "vLLM <= 0.32"

    def refuse(self, drafter: Drafter) -> None:
        if not isinstance(drafter, Medusa):
            raise ValueError(
                f"vLLM cannot serve {type(drafter).__name__}: its Medusa class gives every head "
                "the target's state and nothing else, and no version of vLLM has heads that read "
                "the tokens drafted before them. Use exporter=hf, which Draftsmith's own decoder "
                "loads, or train drafter=medusa for vLLM."
            )
        head = drafter.head(0)
        if isinstance(head, OwnHead) and head.linear.bias is not None:
            raise ValueError(
                "This drafter's vocabulary heads have a bias and vLLM's Medusa heads have none; "
                "train with drafter.head.bias=false, or use exporter=hf."
            )
        if not isinstance(head, (OwnHead, FrozenHead)):
            raise ValueError(
                f"vLLM's Medusa heads are plain matrices, and this drafter has a "
                f"{type(head).__name__}; train with head@drafter.head=own or =frozen, or use "
                "exporter=hf."
            )

    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        self.refuse(drafter)
        assert isinstance(drafter, Medusa)
        dtype = drafter.dtype
        tensors: dict[str, Tensor] = {}
        for i, block in enumerate(drafter.blocks):
            for name, tensor in block.state_dict().items():
                layer, _, kind = name.replace(".linear", "").partition(".")
                tensors[f"blocks.{i}.layers.{layer}.{kind}"] = tensor
        config = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": drafter.hidden_size,
            "vocab_size": drafter.vocab_size,
            "num_heads": drafter.num_depths,
            "num_hidden_layers": len(drafter.blocks[0]),  # type: ignore[arg-type]
            "medusa_fc_bias": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        ids_D = drafter.draft_ids_D
        if isinstance(drafter.head(0), FrozenHead):
            weight_Vd = drafter.target.head_weight_Vd
            rows_Dd = weight_Vd if ids_D is None else weight_Vd[ids_D]
            tensors["lm_heads.0.weight"] = _widen(rows_Dd, ids_D, drafter.vocab_size)
            config["original_lm_head"] = True
        else:
            for i in range(drafter.num_depths):
                head = drafter.head(i)
                assert isinstance(head, OwnHead)
                tensors[f"lm_heads.{i}.weight"] = _widen(
                    head.linear.weight, ids_D, drafter.vocab_size
                )
        tensors = {name: t.to(dtype).detach().cpu().contiguous() for name, t in tensors.items()}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})

    def read(self, folder: Path, target: Target) -> Reader:
        return MedusaCheckpoint(folder, target.device)

    def usage(self, *, target: str, depths: int) -> str:
        words = ", ".join(f"`{w}`" for w in OTHER_METHODS)
        served = "path/to/the/target" if target.startswith(PACKAGE_PREFIX) else target
        return f"""vLLM 0.32 or older (0.33 removed the method), one draft chain of {depths} tokens:

```bash
vllm serve {served} --speculative-config \\
  '{{"method": "medusa", "model": "path/to/this/folder", "num_speculative_tokens": {depths}}}'
```

Keep {words} out of the folder's whole path: vLLM takes them for the name of another method. On a
CPU use temperature 0 only, because vLLM's sampling of drafts is wrong there in 0.32. The heads hold
their vocabulary rows in the file, as the format asks, also where those are the target's own."""


def _widen(weight_Dd: Tensor, ids_D: Tensor | None, vocab_size: int) -> Tensor:
    """U over the whole vocabulary; rows outside the draft vocabulary never win (see the top)."""
    if ids_D is None:
        return weight_Dd
    wide_Vd = weight_Dd.float().mean(0).to(weight_Dd.dtype).repeat(vocab_size, 1)
    wide_Vd[ids_D] = weight_Dd
    return wide_Vd


class MedusaCheckpoint:
    """A reader of the format as the engine's source describes it, in a few lines of torch."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {
            name: t.to(device).float()
            for name, t in load_file(folder / "model.safetensors").items()
        }

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


def problems(folder: Path) -> list[str]:
    """What is wrong with a folder in this format: what the engine drops, refuses or misreads."""
    config = json.loads((folder / "config.json").read_text())
    keys = ("hidden_size", "vocab_size", "num_heads", "num_hidden_layers")
    absent = [f"config.json has no '{key}'" for key in keys if key not in config]
    if absent:
        return absent
    d, vocab, heads, layers = (int(config[key]) for key in keys)
    shared = bool(config.get("original_lm_head", False))
    found = []
    if config.get("architectures") != ["MedusaModel"]:
        found.append(f"architectures is {config.get('architectures')}, expected ['MedusaModel']")
    if config.get("truncated_vocab_size", vocab) != vocab:
        found.append("truncated_vocab_size is set, but the engine cannot load a reduced vocabulary")
    expected: dict[str, tuple[int, ...]] = {}
    for i in range(heads):
        for layer in range(layers):
            expected[f"blocks.{i}.layers.{layer}.weight"] = (d, d)
            if config.get("medusa_fc_bias", False):
                expected[f"blocks.{i}.layers.{layer}.bias"] = (d,)
        if i == 0 or not shared:
            expected[f"lm_heads.{i}.weight"] = (vocab, d)
    return found + tensor_problems(folder / "model.safetensors", expected)


def is_mine(folder: Path) -> bool:
    """Whether config.json is in this format."""
    return json.loads((folder / "config.json").read_text()).get("model_type") == "medusa"
