"""Drafters trained in seconds, and what every engine must make of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.base import Exporter
from export.check import check_export
from export.engine.base import Engine
from export.gate import measure
from export.served import Served
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.eagle3 import Eagle3
from models.target import Target, resolve_name
from tests.export.quick import frequent, prompts, train

LENGTH = 40


def quick(family: str, target: Target, texts: list[Tensor]) -> Drafter:
    """EAGLE-3 over a reduced vocabulary, or the target's first two layers, on these texts but the
    last."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    drafter: Drafter
    if family == "eagle3":
        head = {"_target_": "models.head.own.OwnHead"}
        shape = target.layer_shape
        drafter = Eagle3(**sizes, target_shape=shape, draft_vocab_size=2048, steps=3, head=head)
        drafter.set_vocab(frequent(texts, 2048))
    else:
        head = {"_target_": "models.head.frozen.FrozenHead"}
        config = target.plain_config
        drafter = CausalLm(**sizes, target_config=config, num_layers=2, head=head)
    drafter.bind(target).init_from(target)
    train(drafter, target, texts[:-1], steps=40)
    return drafter


def served_by(
    engine: Engine, exporter: Exporter, drafter: Drafter, target: Target, folder: Path
) -> Served:
    """The engine's greedy answers with the export, beside ours."""
    drafter = exporter.cast(drafter)
    exporter.write(drafter, folder)
    check_export(folder)
    return measure(
        engine,
        folder,
        target_folder=Path(resolve_name(target.name)),
        drafter=drafter,
        target=target,
        prompts=prompts(target),
        gamma=exporter.chain_length(drafter),
        max_new_tokens=LENGTH,
        dtype="float32",
    )


def insist_on_equal_rounds(served: Served, counter: str) -> None:
    """In fp32 nothing is left to rounding: every round is ours, and the engine counts as we do, but
    for what an end or the length limit cut off (llama.cpp counts it, OpenVINO leaves it out)."""
    served.insist()
    assert served.own_texts == served.same_texts == served.same_rounds == len(served.records)
    assert served.engine_accepted_by_depth == served.reference_accepted_by_depth
    accepted = sum(served.reference_accepted_by_depth)
    cut = served.gamma * len(served.records)
    assert abs(served.counters[counter] - accepted) <= cut
    # Some drafts were right and some wrong, so that the counts say something.
    assert 1.2 < served.engine_tau < served.gamma + 1
