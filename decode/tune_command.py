"""`python -m decode tune=true`: which rule ends drafts best on this machine for these prompts."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from conf.console import console, say
from decode.answers import record
from decode.calibration import reliability_plot
from decode.progress import progress_bar
from decode.prompts import Prompt
from decode.report import write_folder
from decode.tree.chain import Chain
from decode.tune import TunePlan, tune
from decode.tune_report import sentences, tune_caption, tune_plot, tune_table
from models.drafter.base import Drafter
from models.target import Target


def check_tune(cfg: DictConfig, policy: Any, drafter: Drafter) -> None:
    """Refuse what a tuning cannot say, before the target writes anything."""
    head = drafter.acceptance
    for given, why in (
        (not isinstance(policy, Chain), "tree is not chain, and rules end chains"),
        (cfg.stop is not None, "stop names one rule, and it tries all of them"),
        (cfg.replay is not None, "replay reads recorded answers in another way"),
        (cfg.top_p < 1, f"top_p={cfg.top_p:g}, and it knows the law of plain sampling only"),
        (bool(cfg.baselines), "baselines have no drafts to end"),
        (cfg.lossless or cfg.floor is not None, "lossless and floor are for one setting"),
        (
            getattr(drafter, "thresholds", None) is not None,
            "the drafter leaves early by thresholds of its own",
        ),
        (
            head is not None and abs(head.temperature - cfg.temperature) > 1e-6,
            f"temperature={cfg.temperature:g}, and the acceptance head was trained for "
            f"{head.temperature if head else 0:g}",
        ),
    ):
        if given:
            raise ValueError(f"A tuning was asked for, but {why}; leave one of the two out.")


def run_tune(
    cfg: DictConfig,
    plan: TunePlan,
    target: Target,
    drafter: Drafter,
    bench: str,
    prompts: list[Prompt],
    run: Path,
    facts: dict[str, Any],
) -> None:
    """Table, sentences, results.json, plot.png and, with a head, reliability.png."""
    recording = record(
        target,
        prompts,
        bench=bench,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=cfg.seed,
    )
    with progress_bar("drafting from every position", len(prompts)) as on_prompt:
        made = tune(
            target=target,
            drafter=drafter,
            recording=recording,
            plan=plan,
            run_dir=run,
            seed=cfg.seed,
            on_answer=on_prompt,
        )
    title = tune_caption(made, bench)
    console.print(tune_table(made, title=title))
    folder = write_folder(
        run / "tune" / f"{bench}-T{cfg.temperature:g}",
        {"bench": bench, **facts, **made.as_dict()},
        draw=lambda file: tune_plot(made, file, caption=title),
    )
    if made.calibration is not None:
        reliability_plot(made.calibration, folder / "reliability.png", caption=title)
    for sentence in sentences(made):
        say(sentence)
    say(f"Written: {folder / 'results.json'} and plot.png")
