"""`python -m decode ... replay=...`: recorded answers in the place of decoding."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from conf.console import console, say
from decode.answers import Recording, record
from decode.plot import plot
from decode.progress import progress_bar
from decode.prompts import Prompt
from decode.replay import ReplayPlan, check_gammas, replay, time_chains, time_shape
from decode.replay_report import (
    best_sentence,
    replay_caption,
    replay_plot,
    replay_table,
    tree_caption,
    tree_table,
)
from decode.replay_trees import TreePlan, replay_tree
from decode.report import write_folder
from decode.tree.chain import Chain
from decode.verifier.base import Verifier
from decode.walk import check_draft
from models.drafter.base import Drafter, Policy
from models.target import Target


def check_replay(
    cfg: DictConfig,
    plan: ReplayPlan | TreePlan,
    policy: Policy,
    verifier: Verifier,
    drafter: Drafter,
) -> None:
    """Refuse what a replay cannot say, before the target writes anything."""
    chains = isinstance(plan, ReplayPlan)
    if isinstance(plan, ReplayPlan):
        check_gammas(drafter, plan.gammas)
    for given, why in (
        (chains and not isinstance(policy, Chain), "tree is not chain, and it follows chains only"),
        (verifier.lossy, "the verifier is lossy, and it needs answers with the target's law"),
        (verifier.greedy_only and cfg.temperature > 0, "greedy verification is not exact there"),
        (cfg.top_p < 1, f"top_p={cfg.top_p:g}, and it knows the law of plain sampling only"),
        (
            isinstance(plan, ReplayPlan) and cfg.stop is not None,
            "stop ends drafts early, and it follows whole chains",
        ),
        (bool(cfg.baselines), "baselines, which learn while the decoder runs"),
        (cfg.lossless, "lossless=true compares answers, and it decodes none"),
        (chains and cfg.floor is not None, "floor is for one shape, and it looks at several"),
    ):
        if given:
            raise ValueError(f"A replay was asked for, but {why}; leave one of the two out.")


def run_chains(
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
    """Several chain lengths: table, results.json and plot."""
    recording = _record(cfg, plan, target, bench, prompts)
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


def run_trees(
    cfg: DictConfig,
    plan: TreePlan,
    policy: Policy,
    target: Target,
    drafter: Drafter,
    bench: str,
    prompts: list[Prompt],
    run: Path,
    facts: dict[str, Any],
) -> float:
    """One deterministic shape: table, results.json and plot. Returns its tokens per step."""
    if prompts:
        check_draft(target, drafter, policy, prompts[0].tokens)
    recording = _record(cfg, plan, target, bench, prompts)
    timing = None
    if plan.timed_prompts > 0:
        say(f"Timing the shape on {plan.timed_prompts} prompts.")
        timing = time_shape(
            target=target,
            drafter=drafter,
            policy=policy,
            prompts=prompts[: plan.timed_prompts],
            temperature=cfg.temperature,
        )
    with progress_bar("replaying", len(prompts)) as on_prompt:
        made = replay_tree(
            target=target,
            drafter=drafter,
            policy=policy,
            recording=recording,
            timing=timing,
            on_prompt=on_prompt,
        )
    title = tree_caption(made, bench)
    console.print(tree_table(made, title=title))
    folder = write_folder(
        run / "replay" / f"{bench}-{made.shape}-T{cfg.temperature:g}",
        {"bench": bench, **facts, **made.as_dict()},
        draw=lambda file: plot(made, file, caption=title),
    )
    say(f"Written: {folder / 'results.json'} and plot.png")
    return made.tau.value


def _record(
    cfg: DictConfig, plan: ReplayPlan | TreePlan, target: Target, bench: str, prompts: list[Prompt]
) -> Recording:
    return record(
        target,
        prompts,
        bench=bench,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=cfg.seed,
        samples=plan.samples,
    )
