"""One Llama decoder layer in a checkpoint: the fields that describe it, and a reader of its maths.

Shape legend: T rows, N of them the last, H query heads, G key and value heads, c head size, e width
of the layer's input, d hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def layer_complaint(config: Any) -> str | None:
    """What of a layer's shape engines would read otherwise."""
    if (config.rope_parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        return (
            "This drafter rotates a part of each attention head, as its target does, and engines' "
            "Llama layers rotate the whole head."
        )
    return None


def layer_fields(config: Any) -> dict[str, Any]:
    """The part of config.json that describes the layer."""
    rope = dict(config.rope_parameters)
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def token_fields(target: Any) -> dict[str, Any]:
    """The target's special ids, for config.json."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(target.config, key, None) for key in keys}


def shape_of(config: dict[str, Any]) -> dict[str, Any]:
    """A layer's fields in a config.json (newer or older spelling) as `Target.layer_shape`."""
    heads = int(config["num_attention_heads"])
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0)
    return {
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "intermediate_size": int(config["intermediate_size"]),
        "max_positions": int(config.get("max_position_embeddings") or 2048),
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **rope},
        "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-6),
    }


def layer_shapes(prefix: str, config: dict[str, Any], inputs: int) -> dict[str, tuple[int, ...]]:
    """Expected tensors of attention and MLP, the input `inputs` times as wide as d."""
    shape = shape_of(config)
    d, c, f = int(config["hidden_size"]), shape["head_dim"], shape["intermediate_size"]
    q, kv = shape["num_heads"] * c, shape["num_kv_heads"] * c
    bias = bool(config.get("attention_bias", False))
    found: dict[str, tuple[int, ...]] = {
        f"{prefix}.self_attn.q_proj.weight": (q, inputs * d),
        f"{prefix}.self_attn.k_proj.weight": (kv, inputs * d),
        f"{prefix}.self_attn.v_proj.weight": (kv, inputs * d),
        f"{prefix}.self_attn.o_proj.weight": (d, q),
        f"{prefix}.mlp.gate_proj.weight": (f, d),
        f"{prefix}.mlp.up_proj.weight": (f, d),
        f"{prefix}.mlp.down_proj.weight": (d, f),
        f"{prefix}.post_attention_layernorm.weight": (d,),
    }
    if bias:
        widths = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": d}
        found |= {f"{prefix}.self_attn.{p}.bias": (w,) for p, w in widths.items()}
    return found


def layer_config_problems(config: dict[str, Any]) -> list[str]:
    """Fields without which the layer is built in another shape, or not at all."""
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    found = [f"config.json has no '{key}'" for key in needed if key not in config]
    if "vocab_size" not in config:
        found[-1] += ", for which engines take a default of their own (32,000 for a Llama)"
    if not (config.get("rope_parameters") or config.get("rope_theta")):
        found.append("config.json has no rope_theta, for which engines take 10,000")
    if "rms_norm_eps" not in config:
        found.append("config.json has no rms_norm_eps, for which engines take 1e-6")
    return found


class CheckpointLayer:
    """Attention and MLP of one layer as a checkpoint has them, in a few lines of torch: all rows at
    once, causally, without a cache."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str, config: dict[str, Any]) -> None:
        self.tensors, self.prefix, self.config = tensors, prefix, config
        shape = shape_of(config)
        self.c = shape["head_dim"]
        self.groups = shape["num_heads"] // shape["num_kv_heads"]
        rope = LlamaConfig(
            hidden_size=int(config["hidden_size"]),
            num_attention_heads=shape["num_heads"],
            head_dim=self.c,
            max_position_embeddings=shape["max_positions"],
            rope_parameters=shape["rope_parameters"],
        )
        self.rotary = LlamaRotaryEmbedding(rope)
        self.eps = float(config.get("rms_norm_eps", 1e-6))

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm with the weight of a full tensor name."""
        return F.rms_norm(x, x.shape[-1:], self.tensors[name], self.eps)

    def _project(self, name: str, x: Tensor) -> Tensor:
        base = f"{self.prefix}.{name}"
        return F.linear(x, self.tensors[f"{base}.weight"], self.tensors.get(f"{base}.bias"))

    def attend(self, z_Te: Tensor, last: int | None = None) -> Tensor:
        """o_proj(attention(z)) with rotary positions 0..T-1, for all rows or the `last` ones."""
        T = z_Te.shape[0]
        N = last or T
        cos, sin = self.rotary(z_Te[None], torch.arange(T, device=z_Te.device)[None])

        def heads(name: str, rows: int) -> Tensor:
            projected = self._project(f"self_attn.{name}", z_Te[T - rows :])
            return projected.view(rows, -1, self.c).transpose(0, 1)

        def rotate(x_HNc: Tensor) -> Tensor:
            low, high = x_HNc.chunk(2, dim=-1)
            at = slice(T - x_HNc.shape[1], T)
            return x_HNc * cos[:, at] + torch.cat([-high, low], dim=-1) * sin[:, at]

        q_HNc = rotate(heads("q_proj", N))
        k_HTc = rotate(heads("k_proj", T)).repeat_interleave(self.groups, 0)
        v_HTc = heads("v_proj", T).repeat_interleave(self.groups, 0)
        scores_HNT = q_HNc @ k_HTc.transpose(1, 2) * self.c**-0.5
        later_NT = torch.ones(T, T, dtype=torch.bool, device=z_Te.device).triu(1)[T - N :]
        mixed_HNc = scores_HNT.masked_fill(later_NT, -torch.inf).softmax(-1) @ v_HTc
        return self._project("self_attn.o_proj", mixed_HNc.transpose(0, 1).reshape(N, -1))

    def mlp(self, x_Td: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = self._project("mlp.gate_proj", x_Td), self._project("mlp.up_proj", x_Td)
        return self._project("mlp.down_proj", F.silu(gate) * up)

    def __call__(self, z_Te: Tensor, residual_Td: Tensor, last: int | None = None) -> Tensor:
        """y = a + MLP(RMSNorm(a)) with a = r + Attention(z)."""
        a_Nd = residual_Td[-(last or 0) :] + self.attend(z_Te, last)
        return a_Nd + self.mlp(self.norm(f"{self.prefix}.post_attention_layernorm.weight", a_Nd))
