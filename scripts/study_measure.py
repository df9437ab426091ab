"""All drafters of a study on the same recorded answers, in one process."""

import shlex
from pathlib import Path

from omegaconf import DictConfig

from conf.check import build
from conf.console import say
from decode.answers import record
from decode.interval import Estimate, bootstrap
from decode.prompts import Bench
from decode.replay import ChainResult, Replayed, count_draft_bytes, replay
from models.drafter.load import load_drafter
from models.run import open_run
from scripts.study_report import Cell, Panel, Score


def measure_all(cfg: DictConfig, cells: list[Cell], *, dataset: Path) -> list[Panel]:
    """One panel for every bench and temperature; the first cell is the drafter at the start."""
    # Any trained cell names the target; its weights and template are checked there.
    trained = cells[-1].run
    assert trained is not None
    target = open_run(trained).load_target(cfg.dtype)
    drafters = [load_drafter(cell.drafter, target).to(target.dtype) for cell in cells]
    benches: list[Bench] = [
        build(node, tokenizer=target.tokenizer, dataset_folder=dataset)
        for node in (cfg.in_domain, cfg.out_of_domain)
    ]
    panels: list[Panel] = []
    read = None
    for bench in benches:
        prompts = bench.prompts(limit=cfg.limit, max_prompt_tokens=cfg.max_prompt_tokens)
        for temperature in cfg.temperatures:
            samples = cfg.samples if temperature > 0 else 1
            recording = record(
                target,
                prompts,
                bench=bench.name,
                max_new_tokens=cfg.max_new_tokens,
                temperature=temperature,
                seed=cfg.seed,
                samples=samples,
            )
            # Cells share one architecture, hence the weight bytes of a draft.
            read = read or count_draft_bytes(target, drafters[0], cfg.gammas, prompts[0])
            replays = [
                replay(
                    target=target,
                    drafter=drafter,
                    recording=recording,
                    gammas=cfg.gammas,
                    draft_bytes=read,
                )
                for drafter in drafters
            ]
            begun = replays[0].chain(cfg.gamma)
            panels.append(
                Panel(
                    bench=bench.name,
                    temperature=temperature,
                    prompts=len(prompts),
                    samples=samples,
                    tokens=replays[0].tokens,
                    scores=[
                        _score(
                            made,
                            cfg.gamma,
                            begun,
                            _command(cfg, cell, bench.name, temperature, dataset),
                        )
                        for cell, made in zip(cells, replays, strict=True)
                    ],
                )
            )
            say(f"{bench.name}, T={temperature:g}: {len(cells)} drafters replayed.")
    return panels


def _score(made: Replayed, gamma: int, begun: ChainResult, command: str) -> Score:
    chain, best = made.chain(gamma), made.chain(made.best_gamma)
    return Score(
        tau=chain.tau,
        gain=_gain(chain, begun),
        acceptance=made.acceptance,
        alpha_by_depth=chain.alpha_by_depth,
        mbsu=chain.mbsu,
        best_gamma=best.gamma,
        best_mbsu=best.mbsu,
        command=command,
    )


def _gain(chain: ChainResult, begun: ChainResult) -> Estimate:
    """tau / tau of the drafter at the start, prompts drawn together: the difference is paired."""
    pairs = [
        (new.produced, new.rounds, old.produced, old.rounds)
        for new, old in zip(chain.records, begun.records, strict=True)
    ]
    return bootstrap(pairs, lambda pair: pair)


def _command(cfg: DictConfig, cell: Cell, bench: str, temperature: float, dataset: Path) -> str:
    """The command that prints this row's tokens per step and acceptance; a bare drafter folder
    cannot be measured alone."""
    if cell.run is None:
        return ""
    arguments = [
        f"run={cell.run}",
        f"bench={bench}",
        *([f"+bench.dataset_folder={dataset}"] if bench == "heldout" else []),
        f"temperature={temperature:g}",
        f"seed={cfg.seed}",
        f"limit={'null' if cfg.limit is None else cfg.limit}",
        f"max_new_tokens={cfg.max_new_tokens}",
        f"max_prompt_tokens={'null' if cfg.max_prompt_tokens is None else cfg.max_prompt_tokens}",
        *([f"dtype={cfg.dtype}"] if cfg.dtype else []),
        "replay=chains",
        f"replay.gammas=[{cfg.gamma}]",
        *([f"replay.samples={cfg.samples}"] if temperature > 0 and cfg.samples > 1 else []),
        "replay.timed_prompts=0",
    ]
    return shlex.join(["python", "-m", "decode", *arguments])
