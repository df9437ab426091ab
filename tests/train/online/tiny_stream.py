"""A learner of a tiny Medusa and served answers to learn from."""

import random

import torch

from data_prep.prompts import Prompt
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.sampling import Sampling
from models.drafter.base import Drafter
from models.drafter.medusa import Medusa
from models.target import Target
from train.losses import ForwardKL
from train.online.acceptance import Serving
from train.online.learner import Learner, Updates
from train.online.served import Listener, Served
from train.teacher import Teacher

GREEDY = Serving(gamma=3, temperature=0.0, draft_temperature=0.0, top_p=1.0)
TOKENS = 24


def prompts(target: Target, count: int, *, seed: int) -> list[Prompt]:
    """Random tokens; no end-of-answer token among them."""
    rng = random.Random(seed)
    return [
        Prompt(f"random/{i}", [rng.randrange(3, target.vocab_size) for _ in range(4 + i % 3)], "")
        for i in range(count)
    ]


def medusa(target: Target, *, seed: int = 0, draft_vocab_size: int | None = None) -> Drafter:
    torch.manual_seed(seed)
    drafter = Medusa(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_heads=3,
        draft_vocab_size=draft_vocab_size,
        head={"_target_": "models.head.own.OwnHead"},
    ).bind(target)
    drafter.init_from(target)
    return drafter.eval()


def learner(target: Target, *, lr: float = 5e-3, z: float = 1.64, **updates: float) -> Learner:
    return Learner(
        serving=medusa(target),
        shadow=medusa(target),
        candidate=medusa(target),
        teacher=Teacher(target=target),
        loss=ForwardKL(),
        make_optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr),
        updates=Updates(**updates),  # type: ignore[arg-type]
        z=z,
        seed=0,
    )


def decoder(target: Target, drafter: Drafter | None, *, temperature: float = 0.0) -> Decoder:
    return Decoder(
        target=target,
        drafter=drafter,
        verifier=Sampling(),
        policy=None if drafter is None else Chain(gamma=3, temperature=temperature),
        temperature=temperature,
    )


def serve(
    target: Target, drafter: Drafter, asked: list[Prompt], *, temperature: float = 0.0
) -> list[Served]:
    served = []
    for prompt in asked:
        listener = Listener()
        made = decoder(target, drafter, temperature=temperature).generate(
            prompt.tokens, max_new_tokens=TOKENS, on_read=listener
        )
        served.append(listener.served(prompt.tokens, made, whole=drafter.reads_features))
    return served
