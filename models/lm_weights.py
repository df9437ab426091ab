"""The weights a small language model starts from, taken from its target or from another model.

Shape legend: d hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.lm_shape import layer_list
from models.target import Target, resolve_name


@dataclass(frozen=True)
class LmWeights:
    """Weights of a model without its vocabulary head, by name; the embedding and the head apart."""

    inner: dict[str, Tensor]
    embedding_Vd: Tensor
    head_Vd: Tensor


def target_weights(target: Target, kept: Sequence[int]) -> LmWeights:
    """Those of the target's layers `kept`, renumbered, and everything around them."""
    return LmWeights(
        _inner_weights(target.model.get_decoder(), kept),
        target.embedding_weight_Vd,
        target.head_weight_Vd,
    )


def source_weights(source: str, target: Target) -> LmWeights:
    """Those of another causal language model. Its tokenizer must be the target's.

    The numbers of rows may differ, because vocabularies are padded: rows beyond the tokenizer's
    tokens are never read, and are zero where the source has fewer.
    """
    folder = resolve_name(source)
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    ours = target.tokenizer.get_vocab()
    if theirs != ours:
        differ = len(set(theirs.items()) ^ set(ours.items()))
        raise ValueError(
            f"drafter.source={source} has {len(theirs)} tokens and the target '{target.name}' "
            f"{len(ours)}, and {differ} (token, id) pairs are only in one of them; drafts are "
            "token ids of the target, so give a model with the same tokenizer."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decoder = model.get_decoder()
    _, layers = layer_list(decoder)
    return LmWeights(
        _inner_weights(decoder, range(len(layers))),
        _with_rows(model.get_input_embeddings().weight, target.vocab_size),
        _with_rows(model.get_output_embeddings().weight, target.vocab_size),
    )


def load_weights(inner: nn.Module, weights: LmWeights, *, own_embedding: bool) -> None:
    """Copy into a model of the same shape."""
    missing, unexpected = inner.load_state_dict(weights.inner, strict=False)
    known: set[str] = set()
    if own_embedding:
        embedding = inner.get_input_embeddings()  # type: ignore[operator]
        known = {f"{name}.weight" for name, m in inner.named_modules() if m is embedding}
        with torch.no_grad():
            embedding.weight.copy_(weights.embedding_Vd)
    assert not unexpected and set(missing) <= known, (missing, unexpected)


def _inner_weights(decoder: nn.Module, kept: Sequence[int]) -> dict[str, Tensor]:
    """State of the decoder with only these layers, renumbered, without its embedding."""
    name, _ = layer_list(decoder)
    place = {layer: new for new, layer in enumerate(kept)}
    embedding = decoder.get_input_embeddings().weight  # type: ignore[operator]
    found: dict[str, Tensor] = {}
    for key, tensor in decoder.state_dict(keep_vars=True).items():
        if tensor is embedding:
            continue
        if not key.startswith(f"{name}."):
            found[key] = tensor.detach()
            continue
        number, _, rest = key.removeprefix(f"{name}.").partition(".")
        if int(number) in place:
            found[f"{name}.{place[int(number)]}.{rest}"] = tensor.detach()
    return found


def _with_rows(weight_Vd: Tensor, rows: int) -> Tensor:
    """The first `rows` rows, with zeros behind them where there are fewer."""
    kept = weight_Vd.detach()[:rows]
    return torch.cat([kept, kept.new_zeros(rows - len(kept), kept.shape[1])])
