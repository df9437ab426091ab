"""A published EAGLE-3 checkpoint as a drafter of ours.

Shape legend: d hidden size, D draft vocabulary, V target vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from export.formats.eagle3_check import IDS
from export.formats.importing import fill, insist_embedding
from export.formats.layer import shape_of
from models.drafter.eagle3 import Eagle3
from models.target import Target

OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}


def load_eagle3(config: dict[str, Any], tensors: dict[str, Tensor], target: Target) -> Eagle3:
    """The weights of a native folder (or of a speculators one, whose fields were put together).

    Layers are those of the field at the top; else of eagle_config, plus one (its ids are the index
    of the layer whose output is read); else the published default. A draft vocabulary in another
    order than ours (ascending) is sorted, the head's rows with it.
    """
    _insist_expressible(config)
    tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    insist_embedding(tensors.pop("embed_tokens.weight", None), target)
    d2t_D, _ = tensors.pop("d2t", None), tensors.pop("t2d", None)
    weights = {"fc.weight": tensors.pop("fc.weight"), "norm.weight": tensors.pop("norm.weight")}
    strays = []
    for name, tensor in tensors.items():
        layer = next((p for p in ("midlayer.", "layers.0.") if name.startswith(p)), None)
        if layer is None:
            if name != "lm_head.weight":
                strays.append(name)
            continue
        inner = name.removeprefix(layer)
        own = inner.startswith(("input_layernorm.", "hidden_norm."))
        weights[inner if own else f"layer.{inner}"] = tensor
    rows_Dd = tensors.get("lm_head.weight")
    ids_D = None if d2t_D is None else torch.arange(len(d2t_D)) + d2t_D.long()
    if ids_D is not None and rows_Dd is not None:
        order_D = ids_D.argsort()
        ids_D, rows_Dd = ids_D[order_D], rows_Dd[order_D]
    if rows_Dd is not None:
        weights["lm_head.linear.weight"] = rows_Dd
    drafter = Eagle3(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=shape_of(config),
        feature_layers=_layers(config),
        norm_output=bool(config.get("norm_output", False)),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        draft_vocab_size=None if ids_D is None else len(ids_D),
        head=FROZEN if rows_Dd is None else OWN,
    )
    if ids_D is not None:
        if int(ids_D.max()) >= target.vocab_size or int(ids_D.min()) < 0:
            raise ValueError(
                f"The checkpoint's draft vocabulary reaches id {int(ids_D.max())}, and the target "
                f"'{target.name}' has {target.vocab_size:,} tokens: d2t holds absolute ids in "
                "place of offsets, or belongs to another target; it cannot be imported."
            )
        drafter.set_vocab(ids_D)
    made = fill(drafter, weights, strays, target)
    assert isinstance(made, Eagle3)
    return made


def _layers(config: dict[str, Any]) -> list[int] | None:
    top, inner = config.get(IDS), (config.get("eagle_config") or {}).get(IDS)
    if top:
        return [int(k) for k in top]
    return [int(k) + 1 for k in inner] if inner else None


def _insist_expressible(config: dict[str, Any]) -> None:
    """Options of other trainers that our EAGLE-3 has no place for."""
    wrong = [key for key in ("norm_before_fc", "fc_norm", "attention_bias") if config.get(key)]
    if int(config.get("num_hidden_layers", 1)) != 1:
        wrong.append(f"num_hidden_layers={config['num_hidden_layers']}")
    if config.get("target_hidden_size") not in (None, config.get("hidden_size")):
        wrong.append(f"target_hidden_size={config['target_hidden_size']}")
    if len(config.get(IDS) or [0, 0, 0]) != 3:
        wrong.append(f"{len(config[IDS])} layers to read")
    if wrong:
        raise ValueError(
            f"The checkpoint is an EAGLE-3 with {', '.join(wrong)}, expected the published net: "
            "three layers, one decoder layer of the target's width, no norms before its fc, no "
            "biases. It cannot be imported; serve it as it is."
        )
