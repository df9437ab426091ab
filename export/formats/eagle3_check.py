"""What can be wrong with an EAGLE-3 folder, native or of the speculators library.

Most of it engines pass over in silence, and draft tokens that are never accepted.

Shape legend: d hidden size, D draft vocabulary, V target vocabulary.
"""

from pathlib import Path
from typing import Any

from export.formats.base import read_config
from export.formats.layer import layer_config_problems, layer_shapes
from export.tensors import load_tensors, map_problems, tensor_problems

IDS = "eagle_aux_hidden_state_layer_ids"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
STRAY = "belongs to no part of this format, and engines drop it in silence"


def native_problems(folder: Path) -> list[str]:
    """What an engine would drop, refuse or misread in a native folder."""
    config = read_config(folder)
    found = layer_config_problems(config) + _flag_problems(config) + _layer_id_problems(config)
    if "draft_vocab_size" not in config:
        found.append(
            "config.json has no 'draft_vocab_size', without which llama.cpp's "
            "converter and SGLang take the folder for another model"
        )
    if int(config.get("num_hidden_layers", 0)) != 1:
        found.append(
            f"num_hidden_layers is {config.get('num_hidden_layers')}, expected 1: engines "
            "norm the input of further layers differently"
        )
    absent = [k for k in ("hidden_size", "vocab_size", "intermediate_size") if k not in config]
    if absent or "num_attention_heads" not in config:
        return found
    expected, optional = expected_tensors(config, "midlayer")
    renamed = {"layers.0.": "midlayer.", "model.": ""}
    found += tensor_problems(folder, expected, optional=optional, renamed=renamed, stray=STRAY)
    return found + vocabulary_map_problems(folder, config) + tokenizer_problems(folder)


def expected_tensors(
    config: dict[str, Any], layer: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """What the folder must hold, and what it may."""
    d, vocab = int(config["hidden_size"]), int(config["vocab_size"])
    size = int(config.get("draft_vocab_size") or vocab)
    read = int(config.get("target_hidden_size") or d)
    count = _aux_count(config)
    expected = {
        "fc.weight": (d, count * read),
        **layer_shapes(layer, config, inputs=2),
        f"{layer}.input_layernorm.weight": (d,),
        f"{layer}.hidden_norm.weight": (d,),
        "norm.weight": (d,),
        "lm_head.weight": (size, d),
    }
    if config.get("norm_before_fc"):
        expected["input_norm.weight"] = (count * read,)
    if config.get("fc_norm"):
        expected |= {f"fc_norm.{i}.weight": (read,) for i in range(count)}
    optional: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, d)}
    if size < vocab:
        expected["d2t"] = (size,)
        optional["t2d"] = (vocab,)
    return expected, optional


def _aux_count(config: dict[str, Any]) -> int:
    inner = (config.get("eagle_config") or {}).get(IDS)
    return int(config.get("num_aux_hidden_states") or len(config.get(IDS) or inner or [0, 0, 0]))


def _flag_problems(config: dict[str, Any]) -> list[str]:
    found = [
        f"{flag} is {config[flag]!r}, expected true or false"
        for flag in FLAGS
        if flag in config and not isinstance(config[flag], bool)
    ]
    if "norm_before_residual" not in config:
        found.append(
            "config.json has no 'norm_before_residual': a reader that guesses it wrong accepts "
            "nothing and says nothing"
        )
    return found


def _layer_id_problems(config: dict[str, Any]) -> list[str]:
    """Both conventions, consistent, and a count that leaves nothing to guess."""
    top, inner = config.get(IDS), (config.get("eagle_config") or {}).get(IDS)
    found = []
    if top is None or inner is None:
        given = "at the top" if inner is None else "inside eagle_config"
        missing = "SGLang" if inner is None else "llama.cpp"
        if top is None and inner is None:
            given, missing = "nowhere", "every engine"
        found.append(
            f"{IDS} stands {given}: {missing} reads its own default layers; write both, the one at "
            "the top counting layers before the feature, the one in eagle_config one less"
        )
    elif [k - 1 for k in top] != list(inner):
        found.append(
            f"{IDS} is {top} at the top and {inner} inside eagle_config, expected "
            f"{[k - 1 for k in top]} there (the index of the layer whose output it is): engines "
            "would read different layers"
        )
    ids = top or inner
    if ids is not None:
        if list(ids) != sorted(set(ids)):
            found.append(f"{IDS} is {ids}, expected ascending: engines join features in that order")
        if min(ids) < (0 if top is None else 1):
            found.append(f"{IDS} is {ids}, and no layer comes before the first")
    count = config.get("num_aux_hidden_states")
    if count is None:
        found.append("config.json has no 'num_aux_hidden_states', for which engines take 3")
    elif ids is not None and int(count) != len(ids):
        found.append(f"num_aux_hidden_states is {count}, but {IDS} names {len(ids)} layers")
    return found


def vocabulary_map_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    """The map of a reduced draft vocabulary, where there is one."""
    try:
        tensors = load_tensors(folder)
    except (ValueError, OSError, RuntimeError):
        return []  # reported with the tensors
    d2t_D = tensors.get("d2t")
    if d2t_D is None:
        return []
    vocab = int(config["vocab_size"])
    if int(config.get("draft_vocab_size") or vocab) == vocab:
        return ["d2t is there although the draft vocabulary is whole, which vLLM cannot load"]
    return map_problems(d2t_D, tensors.get("t2d"), vocab)


def tokenizer_problems(folder: Path) -> list[str]:
    """Half a tokenizer: engines that want one there (OpenVINO's exporter) want all of it."""
    there = [name for name in TOKENIZER if (folder / name).is_file()]
    return [f"{name} is missing" for name in TOKENIZER if there and name not in there]
