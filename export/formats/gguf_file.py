"""Models as GGUF files: names, shapes and conventions of llama.cpp.

Three of them break a drafter in silence, so they are in one place:
- q and k rows of `llama` and `eagle3` are reordered. Rotation pairs dimension 2i with 2i+1 there,
  and i with i + c/2 in transformers, so row i of a head's first half goes to 2i and row i of its
  second half to 2i+1. `qwen2` and `qwen3` keep transformers' order.
- `d2t` of EAGLE-3 holds absolute ids of the target; other formats hold offsets.
- `target_layers` = k is the residual stream after k layers, as feature_layers and the field at the
  top of the native config.json.
Vectors are always fp32; `dtype` is that of matrices. Q8_0 holds one fp16 scale and 32 int8 numbers
for every 32 of a row.

Shape legend: d hidden size, c head size, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import dequantize, quantize
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Kind = Literal["float32", "float16", "bfloat16", "q8_0"]
KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
"""transformers' model_type, and what llama.cpp calls the same layers."""
INTERLEAVED = (MODEL_ARCH.LLAMA,)
EAGLE3 = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "blk.0.attn_norm",
    "hidden_norm": "blk.0.attn_norm_2",
    "self_attn.q_proj": "blk.0.attn_q",
    "self_attn.k_proj": "blk.0.attn_k",
    "self_attn.v_proj": "blk.0.attn_v",
    "self_attn.o_proj": "blk.0.attn_output",
    "mlp.gate_proj": "blk.0.ffn_gate",
    "mlp.up_proj": "blk.0.ffn_up",
    "mlp.down_proj": "blk.0.ffn_down",
    "post_attention_layernorm": "blk.0.ffn_norm",
}
LAYER = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)
"""Fields of the native config that describe the layer."""
Tokenizer = Callable[[GGUFWriter], None]


def write_language_model(
    file: Path,
    *,
    config: Any,
    weights: Mapping[str, Tensor],
    dtype: Kind,
    tokenizer: Tokenizer,
    about: Mapping[str, str],
) -> None:
    """A causal language model of transformers (`weights` with its names; no lm_head when tied)."""
    refuse_architecture(config)
    arch = ARCHITECTURES[config.model_type]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = _begin(file, arch.name.lower(), dtype, about)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer(writer)
    _rotation(writer, config, head_dim)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in weights.items():
        base, _, kind = name.rpartition(".")
        written = names.get_name(base)
        assert written is not None, f"{name} is no part of {config.model_type}"
        if arch in INTERLEAVED and base.endswith(("q_proj", "k_proj")):
            tensor = interleave(tensor, head_dim)
        _add(writer, f"{written}.{kind}", tensor, dtype)
    _finish(writer)


def write_eagle3(
    file: Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    dtype: Kind,
    tokenizer: Tokenizer,
    about: Mapping[str, str],
) -> None:
    """EAGLE-3 from the parts of its native folder (export/formats/eagle3.py). The embedding is the
    target's and is not written."""
    layer = LlamaConfig(**{k: v for k, v in config.items() if k in LAYER})
    assert layer.head_dim is not None
    writer = _begin(file, "eagle3", dtype, about)
    writer.add_block_count(1)
    writer.add_context_length(layer.max_position_embeddings)
    writer.add_embedding_length(layer.hidden_size)
    writer.add_feed_forward_length(layer.intermediate_size)
    writer.add_head_count(layer.num_attention_heads)
    writer.add_head_count_kv(layer.num_key_value_heads or layer.num_attention_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_layer_norm_rms_eps(layer.rms_norm_eps)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_uint32("eagle3.target_hidden_size", config["target_hidden_size"])
    writer.add_array("eagle3.target_layers", config["eagle_aux_hidden_state_layer_ids"])
    for flag in ("norm_before_residual", "norm_before_fc"):
        writer.add_bool(f"eagle3.{flag}", config[flag])
    tokenizer(writer)
    _rotation(writer, layer, layer.head_dim)
    for name, tensor in weights.items():
        if name == "d2t":
            ids_D = tensor + torch.arange(len(tensor), device=tensor.device)
            writer.add_tensor("d2t", ids_D.cpu().numpy().astype(np.int64))
        elif name != "t2d":
            base = name.removeprefix("midlayer.").removesuffix(".weight")
            if base.endswith(("q_proj", "k_proj")):
                tensor = interleave(tensor, layer.head_dim)
            _add(writer, f"{EAGLE3[base]}.weight", tensor, dtype)
    _finish(writer)


def refuse_architecture(config: Any) -> None:
    """Raise ValueError for a language model that is not written here."""
    instead = "use exporter=assistant, whose folder the converter of llama.cpp may know"
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"A GGUF of a '{config.model_type}' model is not written here, expected one of "
            f"{', '.join(ARCHITECTURES)}, because every architecture has names and a rotation of "
            f"its own there; {instead}."
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError(
            "This model's MLP has biases, expected none, because llama.cpp's layers of this "
            f"architecture have none; {instead}."
        )
    windows = getattr(config, "layer_types", None) or []
    plain = config.model_type == "mistral" and getattr(config, "sliding_window", None) is None
    if "sliding_attention" in windows or (config.model_type == "mistral" and not plain):
        raise ValueError(
            "This model attends to a sliding window, expected all earlier positions, because "
            f"llama.cpp's layers of this architecture do; {instead}."
        )
    rotation_factors(config)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (or entries of a bias) of every head as pairs (i, i + c/2)."""
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def rotation_factors(config: Any) -> Tensor | None:
    """What each frequency theta^(-2i/c) is divided by (Llama 3's scaling); None for no scaling."""
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(
            f"This model rotates {rope['partial_rotary_factor']} of each head, expected all of it, "
            "because partial rotation pairs other dimensions in llama.cpp."
        )
    if kind == "default":
        return None
    scaled, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if attention != 1.0 or kind not in ("llama3", "linear"):
        raise ValueError(
            f"This model scales its rotation by '{kind}', expected default, llama3 or linear, "
            "because others depend on the length of the text and a GGUF gets one factor a "
            "frequency here."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return rope["rope_theta"] ** -exponent / scaled


@torch.no_grad()
def round_matrices(module: nn.Module, kind: Kind) -> None:
    """Give every matrix the values that a file of this kind holds, in place. Doing it twice changes
    nothing: in Q8_0 a block of 32 numbers of a row is d * n with whole n, the largest of them 127
    or -127, which gives the same d again."""
    for matrix in module.parameters():
        if matrix.ndim > 1:
            array = matrix.detach().cpu().float().numpy()
            held = dequantize(quantize(array, KINDS[kind][0]), KINDS[kind][0])
            matrix.copy_(torch.from_numpy(held))


def _begin(file: Path, arch: str, dtype: Kind, about: Mapping[str, str]) -> GGUFWriter:
    writer = GGUFWriter(file, arch)
    writer.add_type("model")
    writer.add_file_type(KINDS[dtype][1])
    for key, text in about.items():
        writer.add_string(key, text)
    return writer


def _rotation(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    factors = rotation_factors(config)
    if factors is not None:
        _add(writer, "rope_freqs.weight", factors, "float32")


def _add(writer: GGUFWriter, name: str, tensor: Tensor, dtype: Kind) -> None:
    array = tensor.detach().cpu().float().contiguous().numpy()
    kind = KINDS[dtype][0] if array.ndim > 1 else GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
