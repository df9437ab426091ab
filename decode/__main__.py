"""`python -m decode run=<run folder> bench=<set>`: what a finished drafter gives."""

import inspect
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conf.check import RUNTIME_NAMES, build, check, friendly_errors
from conf.console import console, say
from conf.signature import locate
from decode.answers import record
from decode.baselines.base import Baseline
from decode.measure import measure
from decode.measurement import Measurement
from decode.prompts import Bench, Prompt
from decode.replay import ReplayPlan, check_gammas, replay, time_chains
from decode.replay_report import best_sentence, replay_caption, replay_plot, replay_table
from decode.report import caption, table, write, write_folder
from decode.stop.base import Stop
from decode.tree.chain import Chain
from decode.verifier.base import Verifier
from models.drafter.base import Drafter, Policy
from models.run import Run, open_run
from models.target import Target

SUPPLIED = RUNTIME_NAMES | {"accuracy_KR", "dataset_folder"}
"""Arguments that this command fills in, so that a config need not."""


def decode(cfg: DictConfig) -> int:
    """Measure one run on one benchmark. Returns the exit status: 1 when below the floor."""
    check(cfg, runtime=SUPPLIED)
    _check_lossless(cfg)
    _check_stop(cfg)
    run = open_run(cfg.run)
    target = run.load_target(cfg.dtype)
    drafter = run.load_drafter(target)
    stop: Stop | None = build(cfg.stop)
    policy: Any = build(cfg.tree, accuracy_KR=_rank_accuracy(run), stop=stop, **_sampling(cfg))
    verifier: Verifier = build(cfg.verifier)
    baselines: dict[str, Baseline] = build(cfg.baselines) or {}
    for method in baselines.values():
        method.bind(target)
    plan: ReplayPlan | None = build(cfg.replay)
    if plan is not None:
        _check_replay(cfg, plan, policy, verifier, drafter)
    bench: Bench = build(cfg.bench, tokenizer=target.tokenizer, dataset_folder=_dataset_folder(run))
    prompts = bench.prompts(limit=cfg.limit, max_prompt_tokens=cfg.max_prompt_tokens)
    facts: dict[str, Any] = {
        "command": sys.argv,
        "run": str(run.path),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    if plan is not None:
        _replay(cfg, plan, policy, target, drafter, bench.name, prompts, run.path, facts)
        return 0
    measured = _measure(cfg, target, drafter, policy, verifier, prompts, baselines)
    console.print(table(measured, title=caption(measured, bench.name)))
    name = f"{bench.name}-{policy.name}-T{cfg.temperature:g}"
    folder = write(run.path / "decode" / name, measured, bench=bench.name, facts=facts)
    say(f"Written: {folder / 'results.json'} and plot.png")
    compared = measured.lossless
    if compared is not None:
        say(compared.sentence())
        if cfg.lossless and compared.identical < compared.prompts:
            return 1
    if cfg.floor is not None and measured.tau.value < cfg.floor:
        say(
            f"{measured.tau.value:.3f} tokens per step (bonus included) are below the floor of "
            f"{cfg.floor:g} that was asked for."
        )
        return 1
    return 0


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


def _check_replay(
    cfg: DictConfig, plan: ReplayPlan, policy: Policy, verifier: Verifier, drafter: Drafter
) -> None:
    """Refuse what a replay cannot say, before the target writes anything."""
    check_gammas(drafter, plan.gammas)
    for given, why in (
        (not isinstance(policy, Chain), "tree is not chain, and it follows chains only"),
        (verifier.lossy, "the verifier is lossy, and it needs answers with the target's law"),
        (verifier.greedy_only and cfg.temperature > 0, "greedy verification is not exact there"),
        (cfg.top_p < 1, f"top_p={cfg.top_p:g}, and it knows the law of plain sampling only"),
        (bool(cfg.baselines), "baselines, which learn while the decoder runs"),
        (
            isinstance(plan, ReplayPlan) and cfg.stop is not None,
            "stop ends drafts early, and it follows whole chains",
        ),
        (cfg.lossless, "lossless=true compares answers, and it decodes none"),
        (cfg.floor is not None, "floor is for one shape, and it looks at several"),
    ):
        if given:
            raise ValueError(f"A replay was asked for, but {why}; leave one of the two out.")


def _replay(
    cfg: DictConfig,
    plan: ReplayPlan,
    chain: Chain,
    target: Target,
    drafter: Drafter,
    bench: str,
    prompts: list[Prompt],
    run: Path,
    facts: dict[str, Any],
) -> None:
    recording = record(
        target,
        prompts,
        bench=bench,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=cfg.seed,
        samples=plan.samples,
    )
    timings = None
    if plan.timed_prompts > 0:
        say(f"Timing {len(plan.gammas)} chain lengths on {plan.timed_prompts} prompts.")
        timings = time_chains(
            target=target,
            drafter=drafter,
            gammas=plan.gammas,
            prompts=prompts[: plan.timed_prompts],
            temperature=cfg.temperature,
            draft_temperature=chain.temperature,
        )
    made = replay(
        target=target,
        drafter=drafter,
        recording=recording,
        gammas=plan.gammas,
        draft_temperature=chain.temperature,
        timings=timings,
    )
    title = replay_caption(made, bench)
    console.print(replay_table(made, title=title))
    folder = write_folder(
        run / "replay" / f"{bench}-T{cfg.temperature:g}",
        {"bench": bench, **facts, **made.as_dict()},
        draw=lambda file: replay_plot(made, file, caption=title),
    )
    say(best_sentence(made))
    say(f"Written: {folder / 'results.json'} and plot.png")


def _measure(
    cfg: DictConfig,
    target: Target,
    drafter: Drafter,
    policy: Policy,
    verifier: Verifier,
    prompts: list[Prompt],
    baselines: dict[str, Baseline],
) -> Measurement:
    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tau]:.2f} tokens/step"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(prompts), tau=1.0)
        return measure(
            target=target,
            drafter=drafter,
            policy=policy,
            verifier=verifier,
            prompts=prompts,
            max_new_tokens=cfg.max_new_tokens,
            baseline=cfg.baseline,
            baselines=baselines,
            on_prompt=lambda done, tau: progress.update(task, completed=done, tau=tau),
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
