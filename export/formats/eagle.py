"""EAGLE-1 (and HASS, EAGLE-2, which have its net), in the spellings of three loaders.

    fc.weight                       [d, 2d]  embedding first, then the feature after the final norm
    layers.0.self_attn.*, mlp.*, post_attention_layernorm; no input_layernorm, no norm, no lm_head

The drafted state goes straight to the target's head, so a head of the drafter's own has no place
here, and drafts come from the target's whole vocabulary: a drafter over a part of it with the
target's head is the same net over the whole, and is written (and proven) as that.

The bias c of C. vLLM's fc has none and drops one in silence; SGLang's always has one and leaves it
random when the file has none. For vLLM c moves into the layer, exactly: with z' = z - c,

    W_q z = W_q z' + W_q c            a bias of q, k and v
    z + o = z' + (o + c)              a bias of o_proj

which `attention_bias` switches on there. The other two get fc.bias.

Shape legend: T positions, d hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.base import UNLIMITED, Reader
from export.formats.base import (
    Format,
    embedding_complaint,
    floats,
    head_complaint,
    read_config,
    whole_vocabulary,
    write_files,
)
from export.formats.layer import (
    CheckpointLayer,
    layer_complaint,
    layer_config_problems,
    layer_fields,
    layer_shapes,
    shape_of,
    token_fields,
)
from export.tensors import load_tensors, tensor_problems, tensor_shapes, weight_files
from models.drafter.base import Drafter
from models.drafter.eagle import Eagle
from models.drafter.hass import Hass
from models.eagle_net import EagleNet
from models.head.frozen import FrozenHead
from models.target import Features, Target

FROZEN = {"_target_": "models.head.frozen.FrozenHead"}


class EagleFormat(Format):
    """Base of the spellings."""

    name = "eagle"
    families = (Eagle, Hass)
    architecture: str
    folded = False
    """Whether the bias of fc lies in the attention."""

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, EagleNet)
        if not isinstance(drafter.head(0), FrozenHead):
            return (
                "This drafter has a vocabulary head of its own, and engines give EAGLE's the "
                "target's; train with head@drafter.head=frozen."
            )
        return (
            layer_complaint(drafter.layer.self_attn.config)
            or head_complaint(drafter)
            or embedding_complaint(drafter.target)
        )

    def as_written(self, drafter: Drafter) -> Drafter:
        """Over the target's whole vocabulary."""
        return whole_vocabulary(drafter)

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, EagleNet)
        attention = drafter.layer.self_attn
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            **layer_fields(attention.config),
            "attention_bias": self.folded,
            "vocab_size": drafter.vocab_size,
            "torch_dtype": str(drafter.dtype).removeprefix("torch."),
            **token_fields(drafter.target),
        }
        tensors: dict[str, Tensor] = {"fc.weight": drafter.fc.weight}
        for name, tensor in drafter.layer.state_dict().items():
            if not name.startswith("rotary."):
                tensors[f"layers.0.{name}"] = tensor
        bias_d = drafter.fc.bias.detach()
        if self.folded:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight: Tensor = getattr(attention, name).weight
                tensors[f"layers.0.self_attn.{name}.bias"] = weight.float() @ bias_d.float()
            tensors["layers.0.self_attn.o_proj.bias"] = bias_d
        else:
            tensors["fc.bias"] = bias_d
            config["bias"] = True
        write_files(folder, config, tensors, drafter.dtype)

    def read(self, folder: Path, target: Target) -> Reader:
        return EagleCheckpoint(read_config(folder), floats(folder, target.device), target)

    def is_mine(self, folder: Path) -> bool:
        if (read_config(folder).get("architectures") or [""])[0] != self.architecture:
            return False
        if not all(f.is_file() for f in weight_files(folder)):
            return False
        names = tensor_shapes(folder)[0]
        return "fc.weight" in names and not any(n.startswith("midlayer.") for n in names)

    def problems(self, folder: Path) -> list[str]:
        config = read_config(folder)
        found = layer_config_problems(config)
        absent = [k for k in ("hidden_size", "vocab_size", "intermediate_size") if k not in config]
        if absent or "num_attention_heads" not in config:
            return found
        d, vocab = int(config["hidden_size"]), int(config["vocab_size"])
        expected = {"fc.weight": (d, 2 * d), **layer_shapes("layers.0", config, inputs=1)}
        if not self.folded:
            expected["fc.bias"] = (d,)
        found += tensor_problems(
            folder,
            expected,
            optional={"embed_tokens.weight": (vocab, d)},
            stray="belongs to no part of this format, and the engine drops or misses it",
        )
        return found

    def load(self, folder: Path, target: Target) -> Drafter:
        return load_eagle(read_config(folder), load_tensors(folder), target)


class VllmEagle(EagleFormat):
    """vLLM puts "Eagle" before the architecture's name."""

    architecture = "LlamaForCausalLM"
    folded = True


class SglangEagle(EagleFormat):
    """SGLang's class."""

    name = "eagle (SGLang)"
    architecture = "LlamaForCausalLMEagle"


def load_eagle(config: dict[str, Any], tensors: dict[str, Tensor], target: Target) -> Drafter:
    """EAGLE-1 weights as a drafter of ours; `bias` in any of the places above."""
    from export.formats.importing import fill, insist_embedding

    tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    insist_embedding(tensors.pop("embed_tokens.weight", None), target)
    weights = {"fc.weight": tensors.pop("fc.weight")}
    attention = "layers.0.self_attn"
    folded = tensors.pop(f"{attention}.o_proj.bias", None)
    if folded is not None:
        for name in ("q_proj", "k_proj", "v_proj"):
            bias = tensors.pop(f"{attention}.{name}.bias")
            want = tensors[f"{attention}.{name}.weight"].float() @ folded.float()
            if not torch.allclose(bias.float(), want, rtol=2e-2, atol=1e-3):
                raise ValueError(
                    f"The checkpoint's {attention}.{name}.bias is a bias of its own, expected the "
                    "one that a bias of fc leaves there, because our EAGLE has no other; it cannot "
                    "be imported."
                )
    bias = tensors.pop("fc.bias", None) if folded is None else folded
    weights["fc.bias"] = torch.zeros_like(weights["fc.weight"][:, 0]) if bias is None else bias
    weights |= {
        f"layer.{name.removeprefix('layers.0.')}": t
        for name, t in tensors.items()
        if name.startswith("layers.0.")
    }
    strays = [name for name in tensors if not name.startswith("layers.0.")]
    drafter = Eagle(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=shape_of(config),
        head=FROZEN,
    )
    return fill(drafter, weights, strays, target)


class EagleCheckpoint:
    """A reader of the format as engines describe it: no cache, one forward a draft."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], target: Target) -> None:
        self.tensors, self.target = tensors, target
        self.layer = CheckpointLayer(tensors, "layers.0", config)

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Row t reads f_t and x_{t+1}; its output is f'_{t+1}, which the next draft's row reads."""
        given_Td, tokens_T = features.final_BTd[0].float(), tokens_1T[0, 1:]
        head_Vd = self.target.head_weight_Vd.float()
        drafted: list[int] = []
        for _ in range(UNLIMITED):
            joined = torch.cat([self.target.embed(tokens_T).float(), given_Td], dim=-1)
            z_Td = F.linear(joined, self.tensors["fc.weight"], self.tensors.get("fc.bias"))
            out_d = self.layer(z_Td, z_Td, last=1)[0]
            drafted.append(int((head_Vd @ out_d).argmax()))
            given_Td = torch.cat([given_Td, out_d[None]])
            tokens_T = torch.cat([tokens_T, tokens_T.new_tensor([drafted[-1]])])
        return drafted
