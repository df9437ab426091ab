"""DFlash folders, checked only: native ones and those of the speculators library.

A block of masked tokens is filled in at once, so attention inside a block goes both ways. Which way
a reader takes it is said by a flag that two tools read with opposite defaults.

Shape legend: d hidden size, c head size, A layers of the target that are read.
"""

from pathlib import Path
from typing import Any

from export.formats.base import read_config
from export.formats.layer import layer_config_problems, layer_shapes, shape_of
from export.tensors import tensor_problems

name = "dflash"
FLAG = "sliding_window_non_causal"


def is_mine(folder: Path) -> bool:
    """Whether config.json is that of a DFlash drafter."""
    config = read_config(folder)
    named = (config.get("architectures") or [""])[0]
    return "speculators_model_type" not in config and (
        "dflash_config" in config or named.startswith("DFlash")
    )


def problems(folder: Path) -> list[str]:
    """What engines would read otherwise in a native folder."""
    config = read_config(folder)
    inner = config.get("dflash_config") or {}
    found = layer_config_problems(config)
    for key in ("mask_token_id", "target_layer_ids"):
        if key not in inner:
            found.append(f"dflash_config has no '{key}'")
    found += [f"config.json has no '{k}'" for k in ("block_size",) if k not in config]
    if inner.get("causal"):
        found.append(
            "dflash_config.causal is true: drafted tokens of a block would not see later ones"
        )
    ids = inner.get("target_layer_ids") or []
    return found + _order(ids, "target_layer_ids") + _tensors(folder, config, len(ids))


def speculators_dflash_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    """The same for a folder of the speculators library."""
    found = [
        f"config.json has no '{key}'"
        for key in ("block_size", "mask_token_id", "aux_hidden_state_layer_ids")
        if key not in config
    ]
    inner = config["transformer_layer_config"]
    if FLAG not in config:
        found.append(
            f"config.json has no '{FLAG}', for which vLLM takes true and speculators false"
        )
    elif not config[FLAG] and "full_attention" in _attention(inner):
        found.append(
            f"{FLAG} is false: vLLM then makes every layer causal, and layers of full attention "
            "were trained to see both ways"
        )
    ids = config.get("aux_hidden_state_layer_ids") or []
    flat = {**inner, "draft_vocab_size": config.get("draft_vocab_size")}
    return found + _order(ids, "aux_hidden_state_layer_ids") + _tensors(folder, flat, len(ids))


def _attention(config: dict[str, Any]) -> set[str]:
    return set(config.get("layer_types") or ["full_attention"])


def _order(ids: list[int], field: str) -> list[str]:
    if list(ids) == sorted(set(ids)):
        return []
    return [f"{field} is {ids}, expected ascending: engines join features in that order"]


def _tensors(folder: Path, config: dict[str, Any], layers_read: int) -> list[str]:
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if not layers_read or any(key not in config for key in needed):
        return []
    d, c = int(config["hidden_size"]), shape_of(config)["head_dim"]
    read = int(config.get("target_hidden_size") or d)
    expected: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, layers_read * read),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
    }
    for i in range(int(config.get("num_hidden_layers", 1))):
        expected |= layer_shapes(f"layers.{i}", config, inputs=1)
        expected[f"layers.{i}.input_layernorm.weight"] = (d,)
        expected |= {f"layers.{i}.self_attn.{n}.weight": (c,) for n in ("q_norm", "k_norm")}
    vocab = int(config["vocab_size"])
    size = int(config.get("draft_vocab_size") or vocab)
    optional: dict[str, tuple[int, ...]] = {"lm_head.weight": (size, d)}
    if size < vocab:
        expected |= {"lm_head.weight": (size, d), "d2t": (size,)}
        optional = {"t2d": (vocab,)}
    stray = "belongs to no part of this format (vLLM stops at mask_hidden)"
    return tensor_problems(folder, expected, optional=optional, stray=stray)
