"""Drafters with random weights, and the proof that an export drafts what they draft."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.base import Exporter
from export.check import check_export
from export.hf import DrafterReader
from export.parity import Proof, prove_equal
from models.drafter.base import Drafter
from models.drafter.eagle import Eagle
from models.drafter.eagle3 import Eagle3
from models.drafter.hass import Hass
from models.drafter.hydra_heads import HydraHeads
from models.drafter.kangaroo import Kangaroo
from models.drafter.medusa import Medusa
from models.drafter.mlp_speculator import MlpSpeculator
from models.target import Target

OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
TIED = {"_target_": "models.head.tied.TiedHead"}
LOW_RANK = {"_target_": "models.head.low_rank.LowRankHead", "rank": 8}


def random_weights(drafter: Drafter, target: Target) -> Any:
    """Bound, with weights of which no two parts are alike, and a draft vocabulary with gaps."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in drafter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1))
    if drafter.draft_vocab_size is not None:
        order = torch.randperm(target.vocab_size, generator=generator)
        drafter.set_vocab(order[: drafter.draft_vocab_size])
    return drafter.bind(target).eval()


def eagle3(target: Target, *, head: dict[str, Any] = OWN, **settings: Any) -> Eagle3:
    """Layers in another order than ascending, as a config may name them."""
    settings = {"feature_layers": [2, 1, 3], "draft_vocab_size": 40} | settings
    drafter = Eagle3(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=head,
        **settings,
    )
    return random_weights(drafter, target)


def eagle(
    target: Target, *, family: Any = Eagle, head: dict[str, Any] = FROZEN, **more: Any
) -> Any:
    drafter = family(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=head,
        **more,
    )
    return random_weights(drafter, target)


def hass(target: Target) -> Hass:
    return eagle(target, family=Hass, steps=2)


def hydra(target: Target, *, head: Any = OWN, **more: Any) -> Any:
    drafter = HydraHeads(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        num_heads=3,
        head=head,
        **more,
    )
    return random_weights(drafter, target)


def kangaroo(target: Target, *, head: Any = FROZEN, **more: Any) -> Any:
    drafter = Kangaroo(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=head,
        **more,
    )
    return random_weights(drafter, target)


def medusa(target: Target, *, head: Any = OWN, **more: Any) -> Any:
    drafter = Medusa(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_heads=3,
        head=head,
        **more,
    )
    return random_weights(drafter, target)


def mlp_speculator(target: Target, *, head: Any = OWN, **more: Any) -> Any:
    drafter = MlpSpeculator(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, head=head, **more
    )
    return random_weights(drafter, target)


def texts(target: Target) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, target.vocab_size, (n,), generator=generator) for n in (7, 20)]


def proven(exporter: Exporter, drafter: Drafter, target: Target, folder: Path) -> Proof:
    """Written, validated, read back: as `python -m export` does it."""
    drafter = exporter.cast(drafter)
    exporter.refuse(drafter)
    exporter.write(drafter, folder, texts=texts(target))
    check_export(folder)
    return prove_equal(
        trained=DrafterReader(drafter),
        exported=exporter.read(folder, target),
        drafter=drafter,
        target=target,
        texts=texts(target),
    )
