"""The model card: what a drafter is, what it was made from, what it gives, how to use it."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from export.base import Exporter
from export.parity import Proof
from export.served import Served
from models.drafter.base import Drafter
from models.run import Run

DEFINITIONS = """\
Tokens per step: tokens produced per target forward after the prompt, bonus token included (1.00 is
plain decoding), with a 95 % bootstrap interval over prompts. Acceptance by depth: share of drafts
accepted of those reached. Speed-up: wall clock of the same decoder with and without the drafter, on
the same prompts in one run; it holds for that machine only."""


def model_card(
    *,
    run: Run,
    drafter: Drafter,
    exporter: Exporter,
    proof: Proof,
    figures: dict[str, float] | None = None,
    served: Served | None = None,
) -> str:
    """The text of README.md, from the run's own records.

    `figures` is what the exporter proved beside equal drafts, `served` what the engine gave.
    """
    facts, config = run.facts, run.config
    target = str(config.target.name)
    family = type(drafter).__name__
    stored = sum(p.numel() for p in drafter.parameters())
    longest = drafter.max_depth or "any number of"
    size = drafter.draft_vocab_size
    vocabulary = "whole" if size is None else f"{size:,} of {drafter.vocab_size:,} ids"
    recipe = yaml.safe_dump(
        {key: OmegaConf.to_container(config[key], resolve=True) for key in ("drafter", "dataset")},
        sort_keys=False,
    )
    sections = [
        _front_matter(target, exporter.library),
        f"# {family} drafter for {target}",
        f"A draft model for speculative decoding of `{target}`, trained with Draftsmith. It "
        f"proposes tokens that the target then checks in one forward; {_alone(exporter)}",
        "## Facts",
        facts_table(
            [
                ("target", f"`{target}`"),
                ("target fingerprint", f"`{facts['target']['fingerprint']}`"),
                ("chat template hash", f"`{facts['target']['template_hash']}`"),
                ("family", f"{family}, drafts of up to {longest} tokens"),
                ("draft vocabulary", vocabulary),
                ("own parameters", f"{stored:,}"),
                ("format", f"{exporter.name} ({exporter.engine})"),
                ("dataset", f"{config.dataset.name}, hash `{facts['dataset']['hash']}`"),
                ("trained with", f"`{shlex.join(facts['command'])}`"),
                ("revision", f"`{facts['revision'] or 'not recorded'}`"),
            ]
        ),
        f"Export proven: {proof}{in_words(figures or {})}.",
        "## Numbers",
        numbers(run.path),
        *([] if served is None else _served(served)),
        "## How to use it",
        exporter.usage(target=target, depths=drafter.num_depths),
        "## Licence",
        "The weights were trained on answers of the target, and depend on it: its licence, and "
        "those of the prompts below, say what may be done with them.",
        "## Recipe",
        f"```yaml\n{recipe}```",
    ]
    return "\n\n".join(sections) + "\n"


def _alone(exporter: Exporter) -> str:
    if exporter.writes_text:
        return (
            "it is a small language model, which could write text by itself, but badly: it was "
            "made to guess what that target says."
        )
    return "it only works with that target, and it writes no text by itself."


def _front_matter(target: str, library: str) -> str:
    """What the Hub reads. base_model only where the target is a Hub id."""
    fields: dict[str, Any] = {
        "library_name": library,
        "tags": ["speculative-decoding", "draft-model"],
    }
    is_hub_id = target.count("/") == 1 and not target.startswith((".", "/", "~", "package:"))
    if is_hub_id and not Path(target).exists():
        fields["base_model"] = target
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def in_words(figures: dict[str, float]) -> str:
    """Named figures behind a sentence that has no full stop yet."""
    return "".join(f"; {name.replace('_', ' ')} {x:.3g}" for name, x in figures.items())


def facts_table(rows: list[tuple[str, str]]) -> str:
    """Names and values."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def numbers(run: Path) -> str:
    """One row a measurement found in the run folder."""
    head = "| prompts | temperature | draft | tokens per step | acceptance by depth | speed-up |"
    rows = []
    for file in sorted(run.glob("decode/*/results.json")):
        m = json.loads(file.read_text())
        speed = "" if m["speedup"] is None else f"{m['speedup']['value']:.2f}x"
        alphas = " ".join(f"{a:.2f}" for a in m["alpha_by_depth"])
        rows.append(
            f"| {m['bench']} ({m['prompts']}) | {m['temperature']:g}{_lossy(m)} | {m['shape']} | "
            f"{_estimate(m['tau'])} | {alphas} | {speed} ({m['dtype']}, {m['device']}) |"
        )
    if not rows:
        return (
            "Not measured yet: `python -m decode run=<run>` measures it, and a new export shows it."
        )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows, "", DEFINITIONS])


def _served(served: Served) -> list[str]:
    """What the engine gave, beside the reference decoder."""
    rows = [f"| {' | '.join(row)} |" for row in served.table()]
    table = "\n".join([f"| | {served.engine} | reference decoder |", "|---|---|---|", *rows])
    return [f"Measured in the engine itself. {served.sentence()}.", table]


def _estimate(e: dict[str, float]) -> str:
    return f"**{e['value']:.2f}** [{e['low']:.2f}, {e['high']:.2f}]"


def _lossy(m: dict[str, Any]) -> str:
    return " (lossy acceptance)" if m["lossy"] else ""
