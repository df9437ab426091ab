"""Drafters trained in seconds, and what every engine must make of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.greedy import Greedy
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


def check_served(
    engine: Engine, exporter: Exporter, drafter: Drafter, target: Target, folder: Path
) -> Served:
    """In fp32 nothing is left to rounding: every round is ours, and so is the engine's own count of
    accepted drafts, once it is known what it does with the last round of an answer."""
    served = served_by(engine, exporter, drafter, target, folder)
    served.insist()
    assert served.own_texts == served.same_texts == served.same_rounds == len(served.records)
    assert served.engine_accepted_by_depth == served.reference_accepted_by_depth
    # Some drafts were right and some wrong, so that the counts say something.
    assert 1.2 < served.engine_tau < served.gamma + 1
    decoder = Decoder(
        target=target,
        drafter=exporter.cast(drafter),
        verifier=Greedy(),
        policy=Chain(gamma=served.gamma),
    )
    counter, last_round = COUNTED[engine.name]
    expected = 0
    for prompt in prompts(target):
        *rounds, last = decoder.generate(prompt.tokens, max_new_tokens=LENGTH).rounds
        left = LENGTH - 1 - sum(r.produced for r in rounds)
        expected += sum(r.accepted for r in rounds) + last_round(last.accepted, left)
    assert served.counters[counter] == expected
    return served


COUNTED: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "vllm": ("accepted_tokens", lambda accepted, left: accepted),
    # It drafts one token less than are left.
    "llamacpp": ("draft_n_accepted", lambda accepted, left: min(accepted, left - 1)),
    "openvino": ("accepted_tokens", lambda accepted, left: 0),
}
"""Each engine's counter of accepted drafts, and what it makes of the drafts accepted in the last
round of an answer, with so many tokens left to the length limit."""
