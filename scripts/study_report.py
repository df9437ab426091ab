"""A study as a Markdown table, a CSV file and a picture."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from decode.interval import Estimate
from decode.plot import INK, QUIET

CSV_COLUMNS = (
    "loss", "data", "bench", "T", "gamma", "prompts", "samples", "tokens",
    "tau", "tau_low", "tau_high", "gain", "gain_low", "gain_high",
    "acceptance", "acceptance_low", "acceptance_high", "alpha_by_depth",
    "mbsu", "best_gamma", "best_mbsu",
    "seed", "train_seconds", "run", "train_command", "decode_command",
)  # fmt: skip
START = "(before)"


@dataclass(frozen=True)
class Cell:
    """A drafter of the study. The one that all began with has no loss and no data.

    `run` is its run folder (None when the study began with a bare drafter folder), `command` the
    one that trained it, `facts` those of run.json.
    """

    loss: str | None
    data: str | None
    run: Path | None
    drafter: Path
    command: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One drafter on one bench and temperature; the definitions are in DEFINITIONS."""

    tau: Estimate
    gain: Estimate
    acceptance: Estimate
    alpha_by_depth: list[float]
    mbsu: float
    best_gamma: int
    best_mbsu: float
    command: str


@dataclass(frozen=True)
class Panel:
    """All drafters, in the order of the cells, on one bench and temperature."""

    bench: str
    temperature: float
    prompts: int
    samples: int
    tokens: int
    scores: list[Score]

    @property
    def title(self) -> str:
        """What the numbers were measured on."""
        answers = f" x {self.samples} answers" if self.samples > 1 else ""
        return (
            f"{self.bench}, T={self.temperature:g} ({self.prompts} prompts{answers}, "
            f"{self.tokens:,} tokens)"
        )


DEFINITIONS = """\
- **tokens per step**: tokens produced per target forward after the prompt, bonus token included,
  with a chain of {gamma} drafts; 95 % bootstrap interval over prompts.
- **gain**: tokens per step divided by those of the drafter before training (`{start}`), with a 95 %
  interval from the same prompts drawn for both (paired). An interval above 1 is a real gain.
- **acceptance**: share of drafts accepted if every token of the answer were a first draft.
- **by depth**: share of drafts accepted of those that were reached, first to last of the chain.
- **MBSU**: tokens per step * c / (c + d), c and d the weight bytes read by a target forward and by
  a draft: the speed-up if reading weights were the only cost. **best** is the chain length (up to
  {longest}) with the highest one, and that MBSU.
"""


def write_report(
    out: Path,
    cells: list[Cell],
    panels: list[Panel],
    *,
    gamma: int,
    longest: int,
    seed: int,
    settings: dict[str, Any],
) -> None:
    """table.md, table.csv, heatmap.png and results.json; each appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "table.md", markdown(cells, panels, gamma=gamma, longest=longest, seed=seed))
    content = {
        "settings": settings,
        "cells": [asdict(c) for c in cells],
        "panels": [asdict(p) for p in panels],
    }
    _replace(out / "results.json", json.dumps(content, indent=2, default=str) + "\n")
    fresh = out / "table.csv.tmp"
    with fresh.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(_csv_rows(cells, panels, gamma=gamma, seed=seed))
    fresh.replace(out / "table.csv")
    picture = out / "heatmap.tmp.png"
    heatmap(cells, panels, picture, gamma=gamma)
    picture.replace(out / "heatmap.png")


def markdown(cells: list[Cell], panels: list[Panel], *, gamma: int, longest: int, seed: int) -> str:
    """One table for every bench and temperature; the best tokens per step of each in bold."""
    lines = [f"Seed {seed}; every cell is one run. Commands of every row: table.csv.", ""]
    lines += [DEFINITIONS.format(gamma=gamma, longest=longest, start=START)]
    head = "| loss | data | tokens per step | gain | acceptance | by depth | MBSU | best |"
    for panel in panels:
        lines += [f"### {panel.title}", "", head, "|" + "---|" * 8]
        best = max(score.tau.value for score in panel.scores)
        for cell, score in zip(cells, panel.scores, strict=True):
            tau = f"**{score.tau}**" if score.tau.value == best else str(score.tau)
            row = (
                cell.loss or START,
                cell.data or "",
                tau,
                str(score.gain) if cell.loss else "",
                str(score.acceptance),
                " ".join(f"{a:.2f}" for a in score.alpha_by_depth),
                f"{score.mbsu:.2f}",
                f"{score.best_gamma}: {score.best_mbsu:.2f}",
            )
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def _csv_rows(
    cells: list[Cell], panels: list[Panel], *, gamma: int, seed: int
) -> Iterator[tuple[Any, ...]]:
    for panel in panels:
        for cell, score in zip(cells, panel.scores, strict=True):
            yield (
                cell.loss or START, cell.data or "", panel.bench, panel.temperature, gamma,
                panel.prompts, panel.samples, panel.tokens,
                *_numbers(score.tau), *_numbers(score.gain), *_numbers(score.acceptance),
                " ".join(f"{a:.4f}" for a in score.alpha_by_depth),
                f"{score.mbsu:.4f}", score.best_gamma, f"{score.best_mbsu:.4f}",
                seed, cell.facts.get("results", {}).get("train_seconds", ""),
                cell.run or cell.drafter, cell.command, score.command,
            )  # fmt: skip


def _numbers(estimate: Estimate) -> tuple[str, str, str]:
    return f"{estimate.value:.4f}", f"{estimate.low:.4f}", f"{estimate.high:.4f}"


def heatmap(cells: list[Cell], panels: list[Panel], file: Path, *, gamma: int) -> None:
    """Losses x data, one panel for every bench and temperature: tokens per step, coloured by the
    difference from the drafter before training (blue better, red worse)."""
    trained = [c for c in cells if c.loss is not None]
    losses = list(dict.fromkeys(str(c.loss) for c in trained))
    kinds = list(dict.fromkeys(str(c.data) for c in trained))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    width, height = 5.6 * columns, 1.1 + rows * (1.25 + 0.42 * len(losses))
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    note = f"Tokens per step, chains of {gamma} drafts; colour: change from the drafter before"
    figure.suptitle(note, x=0.02, y=1 - 0.25 / height, ha="left", color=INK, weight="bold")
    colors = LinearSegmentedColormap.from_list("gain", ["#c8553d", "#ffffff", "#3b6fb6"])
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        taus = {
            (cell.loss, cell.data): score.tau.value
            for cell, score in zip(cells, panel.scores, strict=True)
        }
        before = taus[None, None]
        change = np.array([[taus.get((x, k), np.nan) - before for k in kinds] for x in losses])
        reach = max(float(np.nanmax(np.abs(change))), 0.05)  # pale where nothing changed
        axes.imshow(change, cmap=colors, norm=TwoSlopeNorm(0.0, -reach, reach), aspect="auto")
        for y, loss in enumerate(losses):
            for x, kind in enumerate(kinds):
                value = taus.get((loss, kind))
                if value is not None:
                    pale = abs(change[y, x]) < 0.65 * reach
                    axes.text(
                        x, y, f"{value:.2f}", ha="center", va="center", fontsize=10,
                        color=INK if pale else "white",
                        weight="bold" if value == max(taus.values()) else "normal",
                    )  # fmt: skip
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_yticks(range(len(losses)), losses)
        axes.tick_params(length=0, labelsize=9.5, colors=INK)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(
            f"{panel.bench}, T={panel.temperature:g}: {before:.2f} before",
            loc="left", fontsize=11, color=QUIET,
        )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / height))
    figure.savefig(file, dpi=160)


def _replace(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_text(text)
    fresh.replace(file)
