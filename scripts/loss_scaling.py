"""The picture of scripts.bench_loss: memory and time over positions and over the vocabulary.

python -m scripts.loss_scaling bench_loss.json docs/images/loss_scaling.png
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decode.plot import BLUE, LINE, QUIET, SAND, style

COLOURS = {"chunked": BLUE, "plain": SAND, "peer": QUIET}
AXES = {"positions": "positions", "vocab": "vocabulary"}
VALUES = {
    "beyond_mb": ("Memory", "MB beyond inputs and returned gradients"),
    "processor_seconds": ("Time", "processor seconds, forward and backward"),
}


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Four panels; each over the sizes that differ in its axis alone from the commonest."""
    figure = Figure(figsize=(11.5, 8.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    for row, (value, (title, note)) in enumerate(VALUES.items()):
        for column, (axis, name) in enumerate(AXES.items()):
            other = "vocab" if axis == "positions" else "positions"
            # The other size stays at the value that most measurements share.
            fixed = Counter(r[other] for r in results).most_common(1)[0][0]
            chosen = [r for r in results if r[other] == fixed]
            axes = grid[row][column]
            _lines(axes, chosen, axis, value)
            fixed_name = AXES[other]
            style(
                axes,
                f"{title} over {name}",
                f"{note} · {fixed_name} {fixed:,}, d = {chosen[0]['hidden']}",
            )
            axes.set_xlabel(name, color=QUIET)
            axes.set_ylim(bottom=0)
    grid[0][0].legend(frameon=False, fontsize=9.5, loc="upper left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def _lines(axes: Axes, results: list[dict[str, Any]], axis: str, value: str) -> None:
    for way, colour in COLOURS.items():
        for head, dashes in (("trained", "-"), ("frozen", (0, (4, 3)))):
            points = sorted(
                (r[axis], r[value]) for r in results if (r["way"], r["head"]) == (way, head)
            )
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o", linestyle=dashes, color=colour, label=f"{way}, {head} head")
    ticks = sorted({r[axis] for r in results})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=35, ha="right")
    axes.grid(axis="y", color=LINE, linewidth=0.8)


def main() -> None:
    """Draw a finished measurement."""
    source, target = sys.argv[1:]
    plot(json.loads(Path(source).read_text())["results"], Path(target))


if __name__ == "__main__":
    main()
