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
from export.formats.eagle3_check import IDS, native_problems
from export.formats.layer import (
    CheckpointLayer,
    layer_complaint,
    layer_fields,
    token_fields,
)
from export.tensors import load_tensors
from models.drafter.base import Drafter
from models.drafter.eagle3 import Eagle3
from models.target import Features, Target


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
        return native_problems(folder)

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
