"""Tokens per step of every run: a row a run, a mark a shape, a panel a bench and temperature."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decode.plot import BLUE, GREY, INK, LINE, QUIET, SAND, TEAL, style
from scripts.families_cells import OWN
from scripts.families_scores import Comparison

COLORS = (SAND, TEAL, BLUE, "#9b5fb0", "#c8553d")
MARKS = ("o", "s", "D", "^", "v")


def plot(c: Comparison, file: Path) -> None:
    """Draw the picture as a PNG."""
    rows, columns = len(c.benches), len(c.temperatures)
    tall = 1.15 + 0.4 * len(c.labels)
    width, height = 2.0 + 5.0 * columns, 1.2 + rows * tall
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    headline = "Tokens per step, bonus token included"
    figure.text(
        0.02, 1 - 0.28 / height, headline, fontsize=17, weight="bold", color=INK, va="center"
    )
    note = "95 % intervals over prompts; all runs on the same recorded answers of the target"
    figure.text(0.02, 1 - 0.58 / height, note, fontsize=10, color=QUIET, va="center")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex="row")
    figure.subplots_adjust(
        left=1.75 / width, right=1 - 0.2 / width, top=1 - 1.5 / height, bottom=0.75 / height,
        hspace=0.85 / (tall - 0.6), wspace=0.06,
    )  # fmt: skip
    for i, bench in enumerate(c.benches):
        for j, temperature in enumerate(c.temperatures):
            _panel(grid[i][j], c, bench, temperature)
    handles = {}
    for axes in grid.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="lower left", ncols=len(handles), frameon=False,
        fontsize=10, labelcolor=INK, bbox_to_anchor=(0.01, 0.0), handletextpad=0.2,
    )  # fmt: skip
    figure.savefig(file, dpi=160)


def _panel(axes: Axes, c: Comparison, bench: str, temperature: float) -> None:
    some = [s for s in c.scores.values() if (s.bench, s.temperature) == (bench, temperature)]
    prompts = max((s.prompts for s in some), default=0)
    law = "greedy" if temperature == 0 else f"T={temperature:g}"
    style(axes, f"{bench.replace('_', '-')}, {law}", f"{prompts} prompts")
    shapes = [s for s in c.shapes if s != OWN]
    for y, label in enumerate(c.labels):
        if y % 2 == 0:
            axes.axhspan(y - 0.5, y + 0.5, color="#f5f7f9", linewidth=0)
        for k, shape in enumerate([*shapes, OWN]):
            score = c.score(label, bench, temperature, shape)
            if score is None:
                continue
            own = shape == OWN
            color = GREY if own else COLORS[k % len(COLORS)]
            at = y if own else y + 0.26 * (k - (len(shapes) - 1) / 2)
            tau = score.tau
            axes.plot([tau.low, tau.high], [at, at], color=color, linewidth=2.0, alpha=0.65)
            axes.plot(
                tau.value, at, MARKS[0] if own else MARKS[k % len(MARKS)], color=color,
                markersize=6.5, markeredgewidth=0,
                label="needs no training" if own else c.title(shape), linestyle="none",
            )  # fmt: skip
        best = max((s.tau.high for s in some if s.label == label), default=None)
        value = max((s.tau.value for s in some if s.label == label), default=None)
        if best is not None and value is not None:
            axes.annotate(
                f"{value:.2f}", (best, y), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=9, color=INK,
            )  # fmt: skip
    axes.axvline(1.0, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(c.labels)), c.labels)
    axes.set_ylim(len(c.labels) - 0.5, -0.5)
    high = max((s.tau.high for s in c.scores.values() if s.bench == bench), default=2.0)
    axes.set_xlim(0.95, 1.0 + (high - 1.0) * 1.14)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
