"""The architecture of a small language model, derived from its target's (plain config dicts)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from models.target import plain_config, resolve_name


@dataclass(frozen=True)
class LmStart:
    """How a small language model begins (the arguments of models.drafter.causal_lm.CausalLm)."""

    init: str
    num_layers: int | None
    keep: str
    width: int | None
    intermediate_size: int | None
    num_heads: int | None
    num_kv_heads: int | None
    source: str | None

    @property
    def widths(self) -> dict[str, int | None]:
        names = ("width", "intermediate_size", "num_heads", "num_kv_heads")
        return {name: getattr(self, name) for name in names}

    def architecture(self, target: dict[str, Any]) -> dict[str, Any]:
        """The inner model's config, from the target's. Refuses settings that `init` does not read.

        With keep=importance the layers are not known yet: those of the first ones stand in.
        """
        self._check(target["num_hidden_layers"])
        if self.source is not None:
            vocab_size = target["vocab_size"]
            config = AutoConfig.from_pretrained(resolve_name(self.source)).get_text_config()
            return plain_config(config) | {"vocab_size": vocab_size}
        total = target["num_hidden_layers"]
        count = total if self.num_layers is None else self.num_layers
        if count > total:  # a random model may be deeper than its target
            shape = with_layers(target, [i % total for i in range(count)])
        else:
            shape = with_layers(target, kept_layers(self.keep, count, total))
        if self.init == "layers":
            return shape
        if self.init == "width":
            self._check_smaller(target)
        return with_width(shape, **self.widths, new_head_dim=self.init == "random")

    def _check(self, total: int) -> None:
        given = {name: value for name, value in self.widths.items() if value is not None}
        unread: dict[str, Any] = {}
        if self.init in ("layers", "source"):
            unread |= given
        if self.init == "source" and self.num_layers is not None:
            unread["num_layers"] = self.num_layers
        if self.init != "source" and self.source is not None:
            unread["source"] = self.source
        if unread:
            names = ", ".join(f"drafter.{name}={value}" for name, value in unread.items())
            raise ValueError(
                f"drafter.init={self.init} does not read {names}: layers takes num_layers and "
                "keep; width takes those and width, intermediate_size, num_heads, num_kv_heads; "
                "random takes the same sizes; source takes source alone, whose shape is fixed. "
                "Set what is not read to null, or choose another drafter.init."
            )
        if self.init == "source" and self.source is None:
            raise ValueError(
                "drafter.init=source begins with another language model, but drafter.source is "
                "null; give a folder or a Hub id, such as drafter.source=owner/model."
            )
        if self.init == "layers" and self.num_layers is None:
            raise ValueError(
                "drafter.init=layers keeps some of the target's layers, but drafter.num_layers is "
                f"null; give a number from 1 to {total}."
            )
        if self.init == "width" and not given:
            raise ValueError(
                "drafter.init=width makes the target narrower, but none of drafter.width, "
                "intermediate_size, num_heads, num_kv_heads is given; give at least one, or use "
                "drafter.init=layers."
            )
        count = self.num_layers
        if count is not None and (count < 1 or (count > total and self.init != "random")):
            raise ValueError(
                f"drafter.num_layers={count} should lie between 1 and {total}, the number of the "
                "target's layers, because they are kept from it; give another number."
            )

    def _check_smaller(self, target: dict[str, Any]) -> None:
        heads, kv_heads = head_counts(target)
        limits = {
            "width": target["hidden_size"],
            "intermediate_size": target["intermediate_size"],
            "num_heads": heads,
            "num_kv_heads": kv_heads,
        }
        for name, value in self.widths.items():
            if value is not None and not 1 <= value <= limits[name]:
                raise ValueError(
                    f"drafter.{name}={value} should lie between 1 and the target's {limits[name]}, "
                    "because init=width cuts the target down; give a smaller number, or use "
                    "drafter.init=random."
                )
        new_heads = self.num_heads or heads
        new_groups = self.num_kv_heads or max(1, new_heads * kv_heads // heads)
        if new_heads // new_groups > heads // kv_heads:
            raise ValueError(
                f"drafter.num_heads={new_heads} over drafter.num_kv_heads={new_groups} would give "
                f"each key-value head more than the {heads // kv_heads} queries it has in the "
                "target, and none can be added; keep more key-value heads or fewer heads."
            )


def kept_layers(keep: str, num_layers: int, total: int) -> tuple[int, ...]:
    """Which of the target's `total` layers a drafter of `num_layers` layers begins with.

    `first`: 0..n-1. `even`: round(i (L-1) / (n-1)), so first and last are among them; the first
    layer when n = 1. `importance` is decided on text (models/pruning.py); until then, the first.
    """
    if keep == "even" and num_layers > 1:
        return tuple(round(i * (total - 1) / (num_layers - 1)) for i in range(num_layers))
    return tuple(range(num_layers))


def with_layers(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config of a model of these layers: what is listed layer by layer is chosen with them."""
    total = config["num_hidden_layers"]
    chosen = {
        key: [value[i] for i in kept]
        for key, value in config.items()
        if "layer" in key and isinstance(value, list) and len(value) == total
    }
    return config | chosen | {"num_hidden_layers": len(kept)}


def relisted(config: dict[str, Any], target: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config with what is listed layer by layer taken from these layers of the target."""
    chosen = with_layers(target, kept)
    return config | {k: v for k, v in chosen.items() if "layer" in k and isinstance(v, list)}


def with_width(
    config: dict[str, Any],
    *,
    width: int | None,
    intermediate_size: int | None,
    num_heads: int | None,
    num_kv_heads: int | None,
    new_head_dim: bool,
) -> dict[str, Any]:
    """The config with other widths; null keeps the target's.

    Pruned heads keep their size; a random model's heads share the width evenly (`new_head_dim`).
    """
    heads, kv_heads = head_counts(config)
    size = head_size(config)
    changed = num_heads or heads
    groups = num_kv_heads or max(1, changed * kv_heads // heads)
    if changed % groups:
        raise ValueError(
            f"drafter.num_heads={changed} and drafter.num_kv_heads={groups} do not fit, "
            "because every key-value head serves the same number of heads; give a multiple."
        )
    channels: int = width or config["hidden_size"]
    if new_head_dim and (channels, changed) != (config["hidden_size"], heads):
        if channels % changed:
            raise ValueError(
                f"drafter.width={channels} cannot be shared by drafter.num_heads={changed} heads, "
                "because each gets the same number of channels; give a multiple."
            )
        size = channels // changed
    return config | {
        "hidden_size": channels,
        "intermediate_size": intermediate_size or config["intermediate_size"],
        "num_attention_heads": changed,
        "num_key_value_heads": groups,
        "head_dim": size,
    }


def head_counts(config: dict[str, Any]) -> tuple[int, int]:
    """(heads, key-value heads)."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads


def head_size(config: dict[str, Any]) -> int:
    """Channels of one head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def build_inner(architecture: dict[str, Any], *, own_embedding: bool) -> PreTrainedModel:
    """A transformers model of this architecture without a vocabulary head, in fp32.

    Without an embedding of its own it is fed with embeddings and holds none.
    """
    settings = dict(architecture)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except ValueError as error:
        raise ValueError(
            f"The architecture '{architecture['model_type']}' is not one of transformers' own, so "
            "a small model of it cannot be built; use a target (or drafter.source) whose "
            "config.json names an architecture that transformers has."
        ) from error
    if own_embedding:
        return AutoModel.from_config(config, dtype=torch.float32)
    vocab, pad = config.vocab_size, config.pad_token_id
    config.vocab_size, config.pad_token_id = 1, None  # no matrix is made only to be thrown away
    inner = AutoModel.from_config(config, dtype=torch.float32)
    inner.set_input_embeddings(None)
    inner.config.vocab_size, inner.config.pad_token_id = vocab, pad
    return inner


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a transformers model without a head: their name and the list."""
    total = model.config.num_hidden_layers  # type: ignore[union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name, module
    raise ValueError(
        f"The layers of {type(model).__name__} were not found (a list of {total} modules was "
        "expected), so none can be kept; use drafter.init=random or drafter.init=source."
    )
