"""An in-memory dataset, and small drafters over the tiny target."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.shards import Example
from data_prep.signal import SignalRows
from models.drafter.base import Drafter
from models.drafter.hydra_heads import HydraHeads
from models.drafter.medusa import Medusa
from models.target import Features, Target
from train.teacher import Teacher

OWN: dict[str, Any] = {"_target_": "models.head.own.OwnHead"}


@dataclass
class ToyReader:
    """Examples in memory; features of the given target, if any, as feature shards would hold."""

    examples: list[Example]
    target: Target | None = None
    folder: Path = Path("toy")
    calls: list[int] = field(default_factory=list)

    @property
    def layers(self) -> tuple[int, ...] | None:
        return None if self.target is None else ()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        self.calls.append(index)
        return self.examples[index]

    def signal(self, index: int, name: str, /) -> SignalRows:
        raise AssertionError("no signal is stored")

    def features(self, index: int, layers: Any = (), /) -> tuple[Features, Tensor] | None:
        if self.target is None:
            return None
        features = self.target.forward(self.examples[index].tokens[None])
        return features, self.target.project(features.final_BTd).float().logsumexp(-1)[0]


def examples(
    count: int, *, seed: int = 0, prompt: int = 12, answer: int = 16, vocab: int = 300
) -> list[Example]:
    """Random tokens; prompts of up to `prompt` tokens, answers of up to `answer`, then a tail."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        p, a, tail = (int(torch.randint(2, n, (), generator=g)) for n in (prompt, answer, 4))
        tokens = torch.randint(0, vocab, (p + a + tail,), generator=g)
        learn = torch.zeros(len(tokens), dtype=torch.bool)
        learn[p : p + a] = True
        made.append(Example(id=f"toy/{i}", tokens=tokens, learn=learn))
    return made


def hydra(target: Target, *, vocab: int | None = 64, **settings: Any) -> Drafter:
    torch.manual_seed(1)
    return _ready(
        HydraHeads(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            target_shape=target.layer_shape,
            draft_vocab_size=vocab,
            head=OWN,
            num_heads=3,
            **settings,
        ),
        target,
    )


def medusa(target: Target, *, vocab: int | None = 64, **settings: Any) -> Drafter:
    torch.manual_seed(1)
    return _ready(
        Medusa(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            draft_vocab_size=vocab,
            head=OWN,
            num_heads=3,
            **settings,
        ),
        target,
    )


def _ready(drafter: Drafter, target: Target) -> Drafter:
    if drafter.draft_ids_D is not None:
        drafter.set_vocab(torch.arange(0, 2 * len(drafter.draft_ids_D), 2))
    drafter.bind(target)
    drafter.init_from(target)
    # Away from the start, where every head of every depth is the target's.
    with torch.no_grad():
        for p in drafter.parameters():
            p += 0.05 * torch.randn_like(p)
    return drafter


def teacher(target: Target, drafter: Drafter, source: Any = "online") -> Teacher:
    made = Teacher(target=target, source=source, vocab_chunk=100)
    made.set_vocab(drafter.draft_ids_D)
    return made
