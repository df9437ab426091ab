"""The parity gate: the real engine with an export, against our own decoder.

The engine decodes every prompt greedily without and with the drafter. Our drafter is then walked
along the engine's own text (decode/walk.py), which says how many of its drafts a decoder with that
text accepts, round by round. Where our target would write the same text, that is our decoder's
count; where it would not (near-ties of logits that other kernels break otherwise) counts stay
comparable. The first prompts are also decoded by our decoder itself, which must go through the
rounds of the walk.

Both count alike: the prompt's forward and the first token belong to no round, a round's bonus token
is counted, and the last round counts what the length limit or the end of the answer left of it.

Shape legend: T positions, V vocabulary.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
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
from export.engine.process import driver_file
from export.served import Along, Served, served
from models.drafter.base import Drafter
from models.packaged import cache_dir
from models.target import Target

DECODED = 4
"""Prompts that our decoder decodes for real."""


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
    timed: bool = False,
) -> Served:
    """Decode the prompts with the engine and follow it with our drafter; `insist` judges it.

    `drafter` and `target` are in the precision `dtype` that the engine is asked to run in;
    `target_folder` holds that target as transformers reads it. Without `timed` what the engine
    writes alone is kept in the cache for the next drafter; with it, it is written now, so that both
    times are of one run.
    """
    asked: dict[str, Any] = {
        "prompts": [p.tokens for p in prompts],
        "ends": list(target.eos_ids),
        "gamma": gamma,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
    }
    kept = _kept(engine, target, asked)
    if kept.is_file() and not timed:
        plain = _load(kept)
    else:
        say(f"{engine.title} {engine.version} decodes {len(prompts)} prompts without drafter.")
        plain = engine.run(target=target_folder, draft=None, **asked)
        _save(kept, plain)
    say(f"{engine.title} {engine.version} decodes {len(prompts)} prompts with the drafter.")
    drafted = engine.run(target=target_folder, draft=folder, **asked)
    along = [
        follow(drafter, target, prompt, answer.tokens, gamma=gamma)
        for prompt, answer in track(
            list(zip(prompts, drafted.answers, strict=True)),
            "Our drafter along the engine's text",
            console=console,
            transient=True,
        )
    ]
    return served(
        engine=engine.title,
        ids=[p.id for p in prompts],
        plain=plain,
        drafted=drafted,
        along=along,
        decoder=decode(
            drafter, target, prompts[:DECODED], gamma=gamma, max_new_tokens=max_new_tokens
        ),
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        timed=timed,
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
def follow(
    drafter: Drafter, target: Target, prompt: Prompt, tokens: list[int], *, gamma: int
) -> Along:
    """The rounds that our drafter would make along this answer, and the first token of it that our
    target would not have written."""
    answer = Recorded(prompt, tokens, [0.0] * len(tokens))
    chain = Chain(gamma=gamma)
    rounds = walk(target, drafter, chain, answer, max_new_tokens=len(tokens))
    text_1T = torch.tensor([answer.text], device=target.device)
    # The token at position t is the argmax of the state one before it.
    states_Td = target.forward(text_1T).final_BTd[0, len(prompt.tokens) - 1 : -1]
    wanted_T = torch.tensor(tokens, device=target.device)
    wrong = (target.project(states_Td).argmax(-1) != wanted_T).nonzero()
    return Along([r.produced for r in rounds], int(wrong[0, 0]) if len(wrong) else None)


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


def _kept(engine: Engine, target: Target, asked: dict[str, Any]) -> Path:
    """Where the engine's text without drafter is kept: a name made of all that it depends on."""
    driver = driver_file(engine.driver).read_text()
    facts = {**asked, "gamma": None, "target": target.fingerprint(), "driver": driver}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "answers" / f"{engine.name}-{engine.version}-{key}.json"


def _load(file: Path) -> Outcome:
    kept = json.loads(file.read_text())
    return Outcome([Answer(**a) for a in kept["answers"]], kept["counters"], kept["versions"])


def _save(file: Path, outcome: Outcome) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(outcome)))
    temporary.rename(file)
