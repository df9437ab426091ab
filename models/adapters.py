"""Low-rank adapters (LoRA, arXiv 2106.09685) on a drafter's inner model, through peft."""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "default"
SETTINGS = ("r", "alpha", "dropout", "target_modules")


def check_settings(lora: dict[str, Any]) -> None:
    """Refuse settings that do not exist or do not fit."""
    unknown = sorted(set(lora) - set(SETTINGS))
    rank = lora.get("r")
    if unknown or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"drafter.lora={lora} should be {{r, alpha, dropout, target_modules}} with a rank r of "
            "1 or more (alpha null: 2 r; target_modules null: every linear map), because adapters "
            "of another shape do not exist here; correct it, or set drafter.lora=null."
        )


def add_adapters(inner: nn.Module, lora: dict[str, Any]) -> None:
    """Put adapters on linear maps: W x + (alpha / r) B A x, B = 0 at the start. All other weights
    of `inner` are frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    modules = lora.get("target_modules")
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora.get("alpha") or 2 * lora["r"],
        lora_dropout=lora.get("dropout") or 0.0,
        target_modules=modules or linear_names(inner),
    )
    try:
        inject_adapter_in_model(config, inner, adapter_name=NAME)
    except ValueError as error:
        raise ValueError(
            f"drafter.lora.target_modules={modules} names no linear map of this drafter; it has "
            f"{', '.join(linear_names(inner))}."
        ) from error
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_("lora_" in name)


def linear_names(inner: nn.Module) -> list[str]:
    """Last names of the linear maps, each once."""
    found = {n.rpartition(".")[2] for n, m in inner.named_modules() if isinstance(m, nn.Linear)}
    return sorted(found)


def has_adapters(inner: nn.Module) -> bool:
    """Whether `add_adapters` was called."""
    return any("lora_" in name for name, _ in inner.named_parameters())


@torch.no_grad()
def merged_state(inner: nn.Module) -> dict[str, Tensor]:
    """State of the same model without adapters, their products added to the weights."""
    state: dict[str, Tensor] = {}
    for name, tensor in inner.state_dict().items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if name.endswith(".base_layer.weight"):
            layer: Any = inner.get_submodule(name.removesuffix(".base_layer.weight"))
            tensor = tensor + layer.get_delta_weight(NAME).to(tensor.dtype)
        state[plain] = tensor
    return state
