"""The parity gate: the real engine with an export, against our own decoder.

The engine decodes every prompt greedily without and with the drafter, our decoder decodes them too,
and our drafter is walked along the engine's own text (decode/walk.py), which says how many of its
drafts a decoder with that text accepts, round by round. Where both write the same text that is our
decoder's count; where they do not (near-ties of logits that other kernels break otherwise) counts
stay comparable.

Both count alike: the prompt's forward and the first token belong to no round, a round's bonus token
is counted, and the last round counts what the length limit or the end of the answer left of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from conf.console import console, say
from data_prep.prompts import Prompt
from decode.answers import Recorded
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.greedy import Greedy
from decode.walk import walk
from export.engine.base import Answer, Dtype, Engine, Outcome
from export.served import Served, served
from models.drafter.base import Drafter
from models.target import Target


def measure(
    engine: Engine,
    folder: Path,
    *,
    target_folder: Path,
    drafter: Drafter,
    target: Target,
    prompts: Sequence[Prompt],
    gamma: int,
    max_new_tokens: int,
    dtype: Dtype,
    plain: Outcome | None = None,
) -> Served:
    """Decode the prompts with the engine and with our decoder; `insist` judges the result.

    `drafter` and `target` are in the precision `dtype` that the engine is asked to run in;
    `target_folder` holds that target as transformers reads it. `plain` is what the engine wrote
    without drafter, where that is known already.
    """
    shared: Any = {
        "target": target_folder,
        "prompts": [p.tokens for p in prompts],
        "ends": list(target.eos_ids),
        "gamma": gamma,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
    }
    if plain is None:
        say(f"{engine.title} {engine.version} decodes {len(prompts)} prompts without drafter,")
        plain = engine.run(draft=None, **shared)
    say(f"{engine.title} {engine.version} decodes {len(prompts)} prompts with the drafter,")
    drafted = engine.run(draft=folder, **shared)
    say("then our decoder does.")
    decoder = decode(drafter, target, prompts, gamma=gamma, max_new_tokens=max_new_tokens)
    return served(
        engine=engine.title,
        ids=[p.id for p in prompts],
        plain=plain,
        drafted=drafted,
        decoder=decoder,
        reference=[
            rounds_along(drafter, target, prompt, answer.tokens, gamma=gamma)
            for prompt, answer in zip(prompts, drafted.answers, strict=True)
        ],
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
    )


def decode(
    drafter: Drafter, target: Target, prompts: Sequence[Prompt], *, gamma: int, max_new_tokens: int
) -> list[Answer]:
    """Our decoder's greedy answers; its last round is cut as the engine's is."""
    decoder = Decoder(target=target, drafter=drafter, verifier=Greedy(), policy=Chain(gamma=gamma))
    found = []
    for prompt in track(prompts, "Our decoder", console=console, transient=True):
        made = decoder.generate(prompt.tokens, max_new_tokens=max_new_tokens)
        rounds = [r.produced for r in made.rounds]
        if rounds:
            rounds[-1] = len(made.tokens) - 1 - sum(rounds[:-1])
        found.append(Answer(made.tokens, len(rounds), rounds, made.total_s))
    return found


@torch.inference_mode()
def rounds_along(
    drafter: Drafter, target: Target, prompt: Prompt, tokens: list[int], *, gamma: int
) -> list[int]:
    """The tokens of every round that our drafter would make along this answer."""
    answer = Recorded(prompt, tokens, [0.0] * len(tokens))
    chain = Chain(gamma=gamma)
    return [r.produced for r in walk(target, drafter, chain, answer, max_new_tokens=len(tokens))]


def show(served: Served) -> None:
    """Print both sides."""
    table = Table(box=None)
    for heading in ("", served.engine, "reference decoder"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in served.table():
        table.add_row(*row)
    console.print(table)
    for line in served.apart():
        say(line)
    say(f"{served.sentence()}.")
