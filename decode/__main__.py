"""`python -m decode run=<run folder> bench=<set>`: what a finished drafter gives."""

import inspect
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from conf.check import RUNTIME_NAMES, build, check, friendly_errors
from conf.console import console, say
from conf.signature import locate
from decode.baselines.base import Baseline
from decode.measure import measure
from decode.measurement import Measurement
from decode.progress import progress_bar
from decode.prompts import Bench, Prompt
from decode.replay import ReplayPlan
from decode.replay_command import check_replay, run_chains, run_trees
from decode.replay_trees import TreePlan
from decode.report import caption, table, write
from decode.stop.base import Stop
from decode.tune import TunePlan
from decode.tune_command import check_tune, run_tune
from decode.verifier.base import Verifier
from models.drafter.base import Drafter, Policy
from models.run import Run, open_run
from models.target import Target

SUPPLIED = RUNTIME_NAMES | {
    "acceptance",
    "accuracy_KR",
    "dataset_folder",
    "exit_costs",
    "run_dir",
}
"""Arguments that this command fills in, so that a config need not."""


def decode(cfg: DictConfig) -> int:
    """Measure one run on one benchmark. Returns the exit status: 1 when below the floor."""
    check(cfg, runtime=SUPPLIED)
    _check_lossless(cfg)
    _check_stop(cfg)
    run = open_run(cfg.run)
    target = run.load_target(cfg.dtype)
    drafter = run.load_drafter(target)
    stop: Stop | None = build(
        cfg.stop,
        acceptance=drafter.acceptance,
        exit_costs=drafter.exit_costs,
        run_dir=run.path,
    )
    policy: Any = build(
        cfg.tree,
        accuracy_KR=_rank_accuracy(run),
        target=target,
        drafter=drafter,
        run_dir=run.path,
        stop=stop,
        **_sampling(cfg),
    )
    verifier: Verifier = build(cfg.verifier)
    baselines: dict[str, Baseline] = build(cfg.baselines) or {}
    for method in baselines.values():
        method.bind(target)
    plan: ReplayPlan | TreePlan | None = build(cfg.replay)
    tuning: TunePlan = build(cfg.tuning)
    if plan is not None:
        check_replay(cfg, plan, policy, verifier, drafter)
    if cfg.tune:
        check_tune(cfg, policy, drafter)
    bench: Bench = build(cfg.bench, tokenizer=target.tokenizer, dataset_folder=_dataset_folder(run))
    prompts = bench.prompts(limit=cfg.limit, max_prompt_tokens=cfg.max_prompt_tokens)
    facts: dict[str, Any] = {
        "command": sys.argv,
        "run": str(run.path),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    if cfg.tune:
        run_tune(cfg, tuning, target, drafter, bench.name, prompts, run.path, facts)
        return 0
    if plan is not None:
        given = (target, drafter, bench.name, prompts, run.path, facts)
        if isinstance(plan, TreePlan):
            return _floor(cfg, run_trees(cfg, plan, policy, *given))
        run_chains(cfg, plan, policy, *given)
        return 0
    measured = _measure(cfg, target, drafter, policy, verifier, prompts, baselines)
    console.print(table(measured, title=caption(measured, bench.name)))
    name = f"{bench.name}-{policy.name}-T{cfg.temperature:g}"
    folder = write(run.path / "decode" / name, measured, bench=bench.name, facts=facts)
    say(f"Written: {folder / 'results.json'} and plot.png")
    others = {f"{name}: ": other.measured for name, other in measured.beside.items()}
    for name, made in ({"": measured} | others).items():
        compared = made.lossless
        if compared is not None:
            say(f"{name}{compared.sentence()}")
            if cfg.lossless and compared.identical < compared.prompts:
                return 1
    return _floor(cfg, measured.tau.value)


def _floor(cfg: DictConfig, tau: float) -> int:
    """The exit status: 1 below the floor that was asked for."""
    if cfg.floor is None or tau >= cfg.floor:
        return 0
    say(
        f"{tau:.3f} tokens per step (bonus included) are below the floor of {cfg.floor:g} that was "
        "asked for."
    )
    return 1


def _check_lossless(cfg: DictConfig) -> None:
    if cfg.lossless and (cfg.temperature > 0 or not cfg.baseline):
        raise ValueError(
            f"lossless=true compares greedy answers with and without the drafter, but "
            f"temperature={cfg.temperature:g} and baseline={cfg.baseline} were given; use "
            "temperature=0 and baseline=true."
        )


def _check_stop(cfg: DictConfig) -> None:
    if cfg.stop is None:
        return
    if "stop" not in inspect.signature(locate(cfg.tree._target_)).parameters:
        raise ValueError(
            f"stop={cfg.stop._target_} ends a draft early, but {cfg.tree._target_} has no use for "
            "it, because its shape is not a chain; use tree=chain, or stop=null."
        )


def _measure(
    cfg: DictConfig,
    target: Target,
    drafter: Drafter,
    policy: Policy,
    verifier: Verifier,
    prompts: list[Prompt],
    baselines: dict[str, Baseline],
) -> Measurement:
    with progress_bar("decoding", len(prompts)) as on_prompt:
        return measure(
            target=target,
            drafter=drafter,
            policy=policy,
            verifier=verifier,
            prompts=prompts,
            max_new_tokens=cfg.max_new_tokens,
            baseline=cfg.baseline,
            baselines=baselines,
            on_prompt=on_prompt,
            **_sampling(cfg),
        )


def _sampling(cfg: DictConfig) -> dict[str, Any]:
    return {"temperature": cfg.temperature, "top_p": cfg.top_p, "seed": cfg.seed}


def _rank_accuracy(run: Run) -> list[list[float]] | None:
    return run.rank_accuracy() if (run.path / "rank_accuracy.json").is_file() else None


def _dataset_folder(run: Run) -> Path:
    return Path(run.config.dataset.root) / run.config.dataset.name


@hydra.main(version_base=None, config_path="pkg://conf", config_name="decode")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        status = decode(cfg)
    if status:
        raise SystemExit(status)


def main() -> None:
    """Entry point of `draft-decode`."""
    _command()


if __name__ == "__main__":
    main()
