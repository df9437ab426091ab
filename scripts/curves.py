"""Curves of several runs laid over each other, and how far they lie apart.

python -m scripts.curves runs=[runs/a/latest,runs/b/latest] output=curves.png
python -m scripts.curves runs=[...] output=ddp.png numbers=[val/tau,train/loss]

A column of metrics.csv a panel; the name of a run is its folder's. The first run is the one that
others are compared with: printed, and written beside the picture as JSON, is the largest difference
of each run and number over the steps that both have.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import hydra
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.table import Table

from conf.check import friendly_errors
from conf.console import console, say
from decode.plot import BLUE, GREY, QUIET, SAND, TEAL, style

COLORS = (GREY, BLUE, TEAL, SAND, "#9b5fb0", "#c8553d")
DASHES = ("solid", (0, (6, 2)), (0, (4, 3)), (0, (2, 2)), (0, (1, 2)), (0, (5, 1, 1, 1)))


@dataclass(frozen=True)
class Curve:
    """Numbers of a run by step."""

    name: str
    points: dict[str, dict[int, float]]


def read_curve(run: Path, name: str, numbers: list[str]) -> Curve:
    """Raises ValueError where the run has no such number."""
    file = run / "metrics.csv"
    if not file.is_file():
        raise ValueError(
            f"'{run}' is not a run folder with metrics: {file} is missing. Give folders made by "
            "`python -m train` with logger=csv, for example runs=[runs/eagle/latest]."
        )
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    points: dict[str, dict[int, float]] = {}
    for number in numbers:
        points[number] = {int(r["step"]): float(r[number]) for r in rows if r.get(number)}
        if not points[number]:
            known = ", ".join(k for k in (rows[0] if rows else {}) if k != "step")
            raise ValueError(f"'{file}' has no '{number}'; give numbers=[...] out of {known}.")
    return Curve(name, points)


def names_of(runs: list[Path]) -> list[str]:
    """The last parts of the folders' paths that tell them apart."""
    for parts in range(1, max(len(r.parts) for r in runs) + 1):
        names = ["/".join(r.parts[-parts:]) for r in runs]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"runs={[str(r) for r in runs]} names a folder twice; give each one once.")


def differences(curves: list[Curve]) -> dict[str, dict[str, float]]:
    """By run and number, the largest distance from the first run over the steps both have."""
    first, found = curves[0], {}
    for curve in curves[1:]:
        found[curve.name] = {}
        for number, ours in curve.points.items():
            theirs = first.points[number]
            shared = ours.keys() & theirs.keys()
            if not shared:
                raise ValueError(
                    f"'{curve.name}' and '{first.name}' have no step with '{number}' in common, so "
                    "there is nothing to compare; give runs that log at the same steps."
                )
            found[curve.name][number] = max(abs(ours[s] - theirs[s]) for s in shared)
    return found


def picture(curves: list[Curve], file: Path) -> None:
    """A panel a number; later runs are dashed, so that what lies below stays visible."""
    numbers = list(curves[0].points)
    figure = Figure(figsize=(5.5 * len(numbers), 4.2), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(numbers), squeeze=False)[0]
    for axes, number in zip(grid, numbers, strict=True):
        style(axes, number, "by optimizer step")
        for i, curve in enumerate(curves):
            steps = sorted(curve.points[number])
            axes.plot(
                steps,
                [curve.points[number][s] for s in steps],
                label=curve.name,
                color=COLORS[i % len(COLORS)],
                linestyle=DASHES[i % len(DASHES)],
                linewidth=5.0 if i == 0 else 1.8,
                marker="o" if len(steps) == 1 else None,
            )
        axes.tick_params(labelcolor=QUIET)
    grid[-1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def curves(runs: list[Path], numbers: list[str], output: Path) -> dict[str, dict[str, float]]:
    """Draw, print and write; returns the largest differences."""
    if not runs:
        raise ValueError("runs=[] names no run, expected one or more folders; give runs=[a,b].")
    read = [read_curve(r, n, numbers) for r, n in zip(runs, names_of(runs), strict=True)]
    found = differences(read)
    picture(read, output)
    output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    table = Table(title=f"Largest difference from {read[0].name}")
    for column in ("run", *numbers):
        table.add_column(column)
    for name, row in found.items():
        table.add_row(name, *(f"{row[n]:.2g}" for n in numbers))
    console.print(table)
    say(f"The picture is in {output}.")
    return found


@hydra.main(version_base=None, config_path="pkg://conf", config_name="curves")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    with friendly_errors():
        curves([Path(r) for r in cfg.runs], list(cfg.numbers), Path(cfg.output))


if __name__ == "__main__":
    main()
