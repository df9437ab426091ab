"""Kangaroo's adapter as the original code loads it: a LlamaConfig and pytorch_model.bin.

    layers.0.input_layernorm.weight             norm of the early state
    layers.0.self_attn.{q,k,v,o}_proj.weight    no biases
    norm.weight                                 norm of the sum

There is no feed-forward part. The number of shallow layers is an argument there
(`--early_stop_layer`); `early_stop_layer` in config.json keeps it for us. Its rotary base is 10,000
whatever the config says, and its vocabulary head is the target's whole one.

Shape legend: T positions, d hidden size.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.base import UNLIMITED, Reader
from export.formats.base import (
    Format,
    head_complaint,
    plain,
    read_config,
    whole_vocabulary,
)
from export.formats.importing import fill
from export.formats.layer import (
    PROJECTIONS,
    CheckpointLayer,
    layer_config_problems,
    layer_fields,
    layer_shapes,
    shape_of,
    token_fields,
)
from export.tensors import load_tensors, tensor_problems
from models.drafter.base import Drafter
from models.drafter.kangaroo import Kangaroo
from models.head.frozen import FrozenHead
from models.target import Features, Target

FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
FILE = "pytorch_model.bin"
BASE = 10_000.0


class KangarooFormat(Format):
    """The adapter."""

    name = "kangaroo"
    families = (Kangaroo,)

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, Kangaroo)
        if not isinstance(drafter.head(0), FrozenHead):
            return (
                "This drafter has a vocabulary head of its own, and the original Kangaroo uses the "
                "target's; train with head@drafter.head=frozen."
            )
        config: Any = drafter.adapter.attention.config
        rope = config.rope_parameters
        if rope["rope_type"] != "default" or rope["rope_theta"] != BASE or len(rope) > 2:
            return (
                f"This drafter rotates with {dict(rope)}, as its target does, and the original "
                f"Kangaroo always with base {BASE:g} and no scaling."
            )
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            return (
                f"This drafter's attention has {config.num_attention_heads} heads of "
                f"{config.head_dim}, and the original Kangaroo splits {config.hidden_size} evenly."
            )
        return head_complaint(drafter)

    def as_written(self, drafter: Drafter) -> Drafter:
        return whole_vocabulary(drafter)

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, Kangaroo)
        adapter = drafter.adapter
        config = {
            "architectures": ["LlamaForCausalLM"],
            **layer_fields(adapter.attention.config),
            "vocab_size": drafter.vocab_size,
            **token_fields(drafter.target),
            "early_stop_layer": drafter.first.layers,
        }
        tensors: dict[str, Tensor] = {
            "layers.0.input_layernorm.weight": adapter.norm_in.weight,
            "norm.weight": adapter.norm_out.weight,
        }
        for name, tensor in adapter.attention.state_dict().items():
            tensors[f"layers.0.self_attn.{name}"] = tensor
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        torch.save(plain(tensors, drafter.dtype), folder / FILE)

    def read(self, folder: Path, target: Target) -> Reader:
        return KangarooCheckpoint(folder, target)

    def is_mine(self, folder: Path) -> bool:
        if not (folder / FILE).is_file() or "num_attention_heads" not in read_config(folder):
            return False
        names = load_tensors(folder).keys()
        return "layers.0.input_layernorm.weight" in names and not any("mlp" in n for n in names)

    def problems(self, folder: Path) -> list[str]:
        config = read_config(folder)
        found = [p for p in layer_config_problems(config) if "intermediate" not in p]
        if float(config.get("rope_theta") or BASE) != BASE:
            found.append(
                f"rope_theta is {config['rope_theta']:g}, but the original code always uses "
                f"{BASE:g}"
            )
        shapes = layer_shapes("layers.0", {"intermediate_size": 0, **config}, inputs=1)
        d = int(config["hidden_size"])
        expected = {n: s for n, s in shapes.items() if ".self_attn." in n}
        expected |= {"layers.0.input_layernorm.weight": (d,), "norm.weight": (d,)}
        return found + tensor_problems(folder, expected)

    def load(self, folder: Path, target: Target) -> Drafter:
        """`early_stop_layer` of config.json, else the published 2."""
        config, tensors = read_config(folder), load_tensors(folder)
        weights = {
            "adapter.norm_in.weight": tensors.pop("layers.0.input_layernorm.weight"),
            "adapter.norm_out.weight": tensors.pop("norm.weight"),
        }
        for name in PROJECTIONS:
            stored = tensors.pop(f"layers.0.self_attn.{name}.weight")
            weights[f"adapter.attention.{name}.weight"] = stored
        strays = [n for n in tensors if not n.endswith("inv_freq")]
        shape = shape_of({"intermediate_size": target.config.intermediate_size, **config})
        drafter = Kangaroo(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            target_shape=shape | {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}},
            shallow_layers=int(config.get("early_stop_layer", 2)),
            head=FROZEN,
        )
        return fill(drafter, weights, strays, target)


class KangarooCheckpoint:
    """A reader of the file: the target's own first layers, then the adapter, no caches."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.config, self.target = read_config(folder), target
        tensors = {n: t.to(target.device).float() for n, t in load_tensors(folder).items()}
        self.layer = CheckpointLayer(tensors, "layers.0", self.config)

    def _early(self, tokens_1T: Tensor) -> Tensor:
        """The target's stream after its first layers; the others are not run."""
        layers = self.target._decoder_layers(self.target.model.get_decoder())
        hook = layers[self.config["early_stop_layer"] - 1].register_forward_hook(_stop)
        try:
            self.target.model(input_ids=tokens_1T)
        except _Enough as enough:
            return enough.stream_1Td[0].float()
        finally:
            hook.remove()
        raise AssertionError("the hook stops the forward")

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """y_t of all tokens, x_{T-1} too, predicts the next one."""
        drafted: list[int] = []
        for _ in range(UNLIMITED):
            u_Td = self._early(tokens_1T)
            normed_Td = self.layer.norm("layers.0.input_layernorm.weight", u_Td)
            sum_d = u_Td[-1] + self.layer.attend(normed_Td, last=1)[0]
            y_d = self.layer.norm("norm.weight", sum_d)
            drafted.append(int((self.target.head_weight_Vd.float() @ y_d).argmax()))
            tokens_1T = torch.cat([tokens_1T, tokens_1T.new_tensor([[drafted[-1]]])], dim=1)
        return drafted


class _Enough(Exception):
    """Carries the stream out of a forward that need not go on."""

    def __init__(self, stream_1Td: Tensor) -> None:
        super().__init__()
        self.stream_1Td = stream_1Td


def _stop(*seen: Any) -> None:
    made = seen[-1]
    raise _Enough(made[0] if isinstance(made, tuple) else made)
