"""EAGLE-3 as one folder for vLLM, SGLang, llama.cpp's converter, OpenVINO and TensorRT-LLM.

    fc.weight                     [d, 3d]  no bias; features of the layers in ascending order
    midlayer.self_attn.*, mlp.*            q, k, v of width 2d: embedding first
    midlayer.input_layernorm      [d]      of the embedding
    midlayer.hidden_norm          [d]      of the feature
    midlayer.post_attention_layernorm, norm, lm_head [D, d]
    d2t [D], t2d [V]                       where the draft vocabulary is reduced

What engines read differently, and what is therefore written:
- Layers. `eagle_aux_hidden_state_layer_ids` at the top counts layers *before* the feature (vLLM,
  llama.cpp, speculators); the field of the same name inside `eagle_config` is the index of the
  layer whose *output* it is, one less (SGLang, TensorRT-LLM, OpenVINO). Both are there.
- `d2t` holds offsets: target id = i + d2t[i].
- `vocab_size`, `num_aux_hidden_states` and `norm_before_residual` have other defaults elsewhere.
- The target's tokenizer lies beside it: OpenVINO's exporter wants one in the drafter's folder.

Shape legend: T positions, d hidden size, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.base import UNLIMITED, Reader
from export.formats.base import (
    Format,
    embedding_complaint,
    floats,
    head_complaint,
    head_rows,
    read_config,
    write_files,
)
from export.formats.layer import (
    CheckpointLayer,
    layer_complaint,
    layer_config_problems,
    layer_fields,
    layer_shapes,
    token_fields,
)
from export.tensors import load_tensors, map_problems, tensor_problems
from models.drafter.base import Drafter
from models.drafter.eagle3 import Eagle3
from models.target import Features, Target

IDS = "eagle_aux_hidden_state_layer_ids"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
STRAY = "belongs to no part of this format, and engines drop it in silence"


class Eagle3Format(Format):
    """The native folder."""

    name = "eagle3"
    families = (Eagle3,)

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, Eagle3)
        ids = drafter.feature_layers
        if len(set(ids)) < len(ids) or 0 in ids:
            return (
                f"This drafter reads the layers {list(ids)}, and engines name each layer once and "
                "by an output of at least one layer; train with other drafter.feature_layers."
            )
        return (
            layer_complaint(drafter.layer.self_attn.config)
            or head_complaint(drafter)
            or embedding_complaint(drafter.target)
        )

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, Eagle3)
        config = native_config(drafter)
        write_files(folder, config, native_tensors(drafter, "midlayer"), drafter.dtype)
        drafter.target.tokenizer.save_pretrained(folder)

    def read(self, folder: Path, target: Target) -> Reader:
        return Eagle3Checkpoint(read_config(folder), floats(folder, target.device), target)

    def is_mine(self, folder: Path) -> bool:
        config = read_config(folder)
        named = (config.get("architectures") or [""])[0]
        return "speculators_model_type" not in config and (
            "Eagle3" in named
            or "draft_vocab_size" in config
            or IDS in config
            or IDS in (config.get("eagle_config") or {})
        )

    def problems(self, folder: Path) -> list[str]:
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

    def load(self, folder: Path, target: Target) -> Drafter:
        from export.formats.eagle3_import import load_eagle3

        return load_eagle3(read_config(folder), load_tensors(folder), target)


def ordered(drafter: Eagle3) -> list[int]:
    """Places of the drafter's layers in ascending order."""
    return sorted(range(3), key=lambda i: drafter.feature_layers[i])


def native_config(drafter: Eagle3) -> dict[str, Any]:
    """config.json, with every field that some engine would otherwise guess."""
    ids = [drafter.feature_layers[i] for i in ordered(drafter)]
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_fields(drafter.layer.self_attn.config),
        "vocab_size": drafter.vocab_size,
        "draft_vocab_size": drafter.draft_vocab_size or drafter.vocab_size,
        "target_hidden_size": drafter.hidden_size,
        "num_aux_hidden_states": len(ids),
        "norm_before_residual": drafter.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": drafter.norm_output,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        **token_fields(drafter.target),
        IDS: ids,
        "eagle_config": {"use_aux_hidden_state": True, IDS: [k - 1 for k in ids]},
    }


def native_tensors(drafter: Eagle3, layer: str) -> dict[str, Tensor]:
    """The weights under their published names; the decoder layer's begin with `layer`."""
    d = drafter.hidden_size
    parts = drafter.fc.weight.split(d, dim=1)
    tensors = {"fc.weight": torch.cat([parts[i] for i in ordered(drafter)], dim=1)}
    for name, tensor in drafter.layer.state_dict().items():
        if not name.startswith("rotary."):
            tensors[f"{layer}.{name}"] = tensor
    tensors[f"{layer}.input_layernorm.weight"] = drafter.input_layernorm.weight
    tensors[f"{layer}.hidden_norm.weight"] = drafter.hidden_norm.weight
    tensors["norm.weight"] = drafter.norm.weight
    tensors["lm_head.weight"] = head_rows(drafter)
    ids_D = drafter.draft_ids_D
    if ids_D is not None and len(ids_D) < drafter.vocab_size:
        tensors["d2t"] = ids_D - torch.arange(len(ids_D), device=ids_D.device)
        kept_V = torch.zeros(drafter.vocab_size, dtype=torch.bool, device=ids_D.device)
        tensors["t2d"] = kept_V.index_fill(0, ids_D, True)
    return tensors


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


class Eagle3Checkpoint:
    """A reader of the format as engines describe it: no cache, one forward a draft."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], target: Target) -> None:
        self.config, self.tensors, self.target = config, tensors, target
        native = any(name.startswith("midlayer.") for name in tensors)
        self.name = "midlayer" if native else "layers.0"
        self.layer = CheckpointLayer(tensors, self.name, config)
        if "lm_head.weight" not in tensors:
            tensors["lm_head.weight"] = target.head_weight_Vd.float()

    def step(self, given_Td: Tensor, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """(draft logits `[D]`, what is fed back `[d]`) at the last of these rows."""
        embedded_Td = self.target.embed(tokens_T).float()
        normed_Td = self.layer.norm(f"{self.name}.hidden_norm.weight", given_Td)
        e_Td = self.layer.norm(f"{self.name}.input_layernorm.weight", embedded_Td)
        residual_Td = normed_Td if self.config.get("norm_before_residual") else given_Td
        out_d = self.layer(torch.cat([e_Td, normed_Td], dim=-1), residual_Td, last=1)[0]
        state_d = self.layer.norm("norm.weight", out_d)
        logits_D = self.tensors["lm_head.weight"] @ state_d
        return logits_D, state_d if self.config.get("norm_output") else out_d

    def combined(self, features: Features) -> Tensor:
        """g = C [h^low; h^mid; h^high], `[T, d]`."""
        layers = self.target.num_layers
        inner = (self.config.get("eagle_config") or {}).get(IDS)
        after = inner and [k + 1 for k in inner]
        ids = self.config.get(IDS) or after or [2, layers // 2, layers - 3]
        joined = torch.cat([features.layers[k][0].float() for k in ids], dim=-1)
        return joined @ self.tensors["fc.weight"].T

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Row t reads g_t and x_{t+1}; a draft adds a row with its own output in place of g."""
        given_Td, tokens_T = self.combined(features), tokens_1T[0, 1:]
        drafted: list[int] = []
        for _ in range(UNLIMITED):
            logits_D, back_d = self.step(given_Td, tokens_T)
            token = int(logits_D.argmax())
            if "d2t" in self.tensors:
                token += int(self.tensors["d2t"][token])
            drafted.append(token)
            given_Td = torch.cat([given_Td, back_d[None]])
            tokens_T = torch.cat([tokens_T, tokens_T.new_tensor([token])])
        return drafted
