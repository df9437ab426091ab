"""Which layers, channels and heads of a target matter on text, and cutting a model down to them.

Depth: the importance of a layer is 1 - cos(h_in, h_out), averaged over positions (ShortGPT, arXiv
2403.03853). Width (Minitron, arXiv 2407.14679): residual channels are scored by the mean size of
the norms' outputs over all layers, because all layers share them; FFN channels by what enters the
down projection and heads by the norm of what enters the output projection, layer by layer. Kept
indices are ascending, so that cutting to the full width changes nothing.

Shape legend: T positions, L layers, d residual channels, F FFN channels, H heads, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.lm_shape import head_counts, head_size, layer_list
from models.lm_weights import LmWeights
from models.target import Target

MAX_TOKENS = 512
"""Of each calibration text: more of one text says little more."""

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linear maps that read the residual stream; o_proj and down_proj write to it."""


@dataclass(frozen=True)
class Scores:
    """Mean activation sizes of a target on text."""

    channels_d: Tensor
    ffn_LF: Tensor
    heads_LH: Tensor


def block_importance(target: Target, calibration: Sequence[Tensor]) -> Tensor:
    """1 - cos(h_in, h_out) of every layer, `[L]`."""
    _, layers = layer_list(target.model.get_decoder())
    total_L = torch.zeros(len(layers), dtype=torch.double)

    def watch(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
            total_L[index] += float((1 - cosine).sum())

        return hook

    handles = [
        layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    with _hooks(handles):
        count = _run(target, calibration, "drafter.keep=importance")
    return total_L / count


def activation_scores(target: Target, calibration: Sequence[Tensor]) -> Scores:
    """How large residual channels, FFN channels and heads are on the texts."""
    decoder = target.model.get_decoder()
    _, layers = layer_list(decoder)
    heads, _ = head_counts(target.plain_config)
    channels_d = torch.zeros(target.hidden_size, dtype=torch.double)
    ffn: list[Tensor] = [torch.zeros(()) for _ in layers]
    head: list[Tensor] = [torch.zeros(()) for _ in layers]
    handles = []

    def add_channels(_: nn.Module, __: Any, output: Tensor) -> None:
        channels_d.add_(output.abs().flatten(0, -2).double().sum(0).cpu())

    def add_ffn(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            ffn[index] = ffn[index] + args[0].abs().flatten(0, -2).double().sum(0).cpu()

        return hook

    def add_heads(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            norms_TH = args[0].flatten(0, -2).unflatten(-1, (heads, -1)).double().norm(dim=-1)
            head[index] = head[index] + norms_TH.sum(0).cpu()

        return hook

    for i, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if name.endswith("layernorm"):
                handles.append(module.register_forward_hook(add_channels))
            elif name.endswith("down_proj"):
                handles.append(module.register_forward_pre_hook(add_ffn(i)))
            elif name.endswith("o_proj"):
                handles.append(module.register_forward_pre_hook(add_heads(i)))
    with _hooks(handles):
        _run(target, calibration, "drafter.init=width")
    if not all(x.dim() == 1 for x in (*ffn, *head)):
        raise _unknown(type(decoder).__name__)
    return Scores(channels_d, torch.stack(ffn), torch.stack(head))


def cut(
    weights: LmWeights,
    scores: Scores,
    *,
    kept: Sequence[int],
    before: dict[str, Any],
    after: dict[str, Any],
) -> LmWeights:
    """The weights of layers `kept` at the widths of config `after`.

    One set of residual channels for the whole model; FFN channels and heads layer by layer. Heads
    go in groups: the key-value heads whose queries are largest together, and of each group the
    largest queries. Embeddings that the architecture multiplies by sqrt(d) are rescaled, so that
    the same embedding enters the first layer.
    """
    channels_d = _best(scores.channels_d, after["hidden_size"])
    size = head_size(before)
    inner: dict[str, Tensor] = {}
    plans = [
        _Plan(
            channels_d,
            _best(scores.ffn_LF[layer], after["intermediate_size"]),
            *_best_heads(scores.heads_LH[layer], head_counts(before), head_counts(after), size),
        )
        for layer in kept
    ]
    for name, weight in weights.inner.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is None:
            assert weight.shape == (before["hidden_size"],), name  # the final norm
            inner[name] = weight[channels_d]
        else:
            inner[name] = plans[number].slice(name, weight, before["hidden_size"], size)
    scaled = before["model_type"].startswith("gemma")
    scale = (before["hidden_size"] / after["hidden_size"]) ** 0.5 if scaled else 1.0
    return LmWeights(
        inner, weights.embedding_Vd[:, channels_d] * scale, weights.head_Vd[:, channels_d]
    )


@dataclass(frozen=True)
class _Plan:
    """What is kept of one layer: indices of residual channels, FFN channels, query and key rows."""

    channels_d: Tensor
    ffn_F: Tensor
    queries: Tensor
    keys: Tensor

    def slice(self, name: str, weight: Tensor, width: int, head_dim: int) -> Tensor:
        kind = name.split(".")[-2]
        rows = {
            "q_proj": self.queries,
            "k_proj": self.keys,
            "v_proj": self.keys,
            "gate_proj": self.ffn_F,
            "up_proj": self.ffn_F,
            "o_proj": self.channels_d,
            "down_proj": self.channels_d,
        }
        if kind in rows:
            weight = weight[rows[kind]]
            if weight.dim() == 1:  # a bias
                return weight
            if kind in COLUMNS:
                return weight[:, self.channels_d]
            return weight[:, self.queries if kind == "o_proj" else self.ffn_F]
        if weight.shape == (width,) and kind.endswith("layernorm"):
            return weight[self.channels_d]
        if weight.shape == (head_dim,):  # a norm inside each head
            return weight
        raise _unknown(f"a model with a weight {name}")


def _best(scores_N: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending."""
    return scores_N.topk(count).indices.sort().values


def _best_heads(
    scores_H: Tensor, before: tuple[int, int], after: tuple[int, int], size: int
) -> tuple[Tensor, Tensor]:
    """Rows of the kept query heads and of the kept key-value heads."""
    groups = scores_H.unflatten(0, (before[1], -1))
    kept_groups = _best(groups.sum(-1), after[1])
    each = after[0] // after[1]
    per_group = before[0] // before[1]
    kept_heads = torch.cat([_best(groups[g], each) + g * per_group for g in kept_groups])
    offsets = torch.arange(size)
    rows = [(heads[:, None] * size + offsets).flatten() for heads in (kept_heads, kept_groups)]
    return rows[0], rows[1]


@torch.no_grad()
def _run(target: Target, calibration: Sequence[Tensor], asked: str) -> int:
    """The target reads the texts; returns the number of positions."""
    if not calibration:
        raise ValueError(
            f"{asked} looks at what the target does on text, but no calibration text was given; "
            "pass token sequences to init_from, or choose an init that needs none."
        )
    for tokens_T in calibration:
        target.forward(tokens_T[None, :MAX_TOKENS].to(target.device))
    return sum(min(len(tokens_T), MAX_TOKENS) for tokens_T in calibration)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unknown(what: str) -> ValueError:
    return ValueError(
        f"Width pruning knows layers with q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        f"down_proj and norms over the hidden size (Llama, Mistral, Qwen, Gemma and their kin), "
        f"not {what}; use drafter.init=layers, random or source for this target."
    )
