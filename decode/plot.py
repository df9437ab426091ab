"""One picture of a measurement: acceptance by depth, tokens per step by category, time a round."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from decode.interval import Counts, Estimate

INK, QUIET, LINE = "#22272e", "#7a8490", "#dfe3e8"
BLUE, TEAL, SAND, GREY = "#3b6fb6", "#2a9d8f", "#e0a458", "#b8c0ca"
MAX_CATEGORIES = 14


class Pictured(Protocol):
    """What the picture shows of a measurement or a replay; without `target_ms` no times."""

    @property
    def tau(self) -> Estimate: ...
    @property
    def tau_by_category(self) -> dict[str, Estimate]: ...
    @property
    def alpha_by_depth(self) -> list[float]: ...
    @property
    def reached_by_depth(self) -> list[int]: ...
    @property
    def break_even_tau(self) -> float | None: ...
    @property
    def speedup(self) -> Estimate | None: ...
    @property
    def lossy(self) -> bool: ...
    @property
    def records(self) -> Sequence[Counts]: ...
    @property
    def draft_ms(self) -> float: ...
    @property
    def target_ms(self) -> float | None: ...
    @property
    def verify_ms(self) -> float | None: ...
    @property
    def plain_ms(self) -> float | None: ...
    @property
    def plain_target_ms(self) -> float | None: ...


def plot(
    m: Pictured, file: Path, *, caption: str, others: Mapping[str, Pictured] | None = None
) -> None:
    """Draw the picture as a PNG. `others` are measured on the same prompts, for comparison."""
    categories = min(len(m.tau_by_category), MAX_CATEGORIES)
    height = 6.2 + max(0, categories - 7) * 0.24
    figure = Figure(figsize=(11.5, height), facecolor="white")
    FigureCanvasAgg(figure)
    top = 1 - 1.45 / height
    grid = GridSpec(
        2,
        2,
        figure=figure,
        width_ratios=(1, 1.2),
        height_ratios=(height - 3.4, 1.15),
        left=0.095,
        right=0.965,
        top=top,
        bottom=0.62 / height,
        hspace=1.25 / (height - 3.4) + 0.25,
        wspace=0.42,
    )
    _headline(figure, m, caption, height)
    _acceptance(figure.add_subplot(grid[0, 0]), m)
    _categories(figure.add_subplot(grid[0, 1]), m, others or {})
    if m.target_ms is not None and m.verify_ms is not None:
        _time(figure.add_subplot(grid[1, :]), m, m.target_ms, m.verify_ms)
    figure.savefig(file, dpi=160)


def _headline(figure: Figure, m: Pictured, caption: str, height: float) -> None:
    text = f"{m.tau.value:.2f} tokens per step"
    if m.speedup is not None:
        text += f"   ·   {m.speedup.value:.2f}x the speed of plain decoding"
    left = 0.03
    figure.text(left, 1 - 0.3 / height, text, fontsize=18, weight="bold", color=INK, va="center")
    note = caption + ("  ·  lossy acceptance" if m.lossy else "")
    figure.text(left, 1 - 0.62 / height, note, fontsize=10, color=QUIET, va="center")


def _acceptance(axes: Axes, m: Pictured) -> None:
    """Bars: alpha_k; a bar that few drafts reached is paler."""
    style(axes, "Acceptance by depth", "share of drafts accepted, of those reached")
    depths = range(1, len(m.alpha_by_depth) + 1)
    most = max(m.reached_by_depth, default=1) or 1
    for depth, alpha, reached in zip(depths, m.alpha_by_depth, m.reached_by_depth, strict=True):
        strength = 0.4 + 0.6 * (reached / most) ** 0.5
        axes.bar(depth, alpha, width=0.62, color=_paler(BLUE, strength))
        axes.text(depth, alpha + 0.025, f"{alpha:.2f}", ha="center", color=INK, fontsize=10.5)
    axes.set_ylim(0, 1.08)
    axes.set_xlim(0.4, max(len(m.alpha_by_depth), 3) + 0.6)
    reached = m.reached_by_depth
    axes.set_xticks(list(depths), [f"draft {d}\nof {reached[d - 1]:,}" for d in depths])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.grid(axis="y", color=LINE, linewidth=0.8)


def _categories(axes: Axes, m: Pictured, others: Mapping[str, Pictured]) -> None:
    """Dots with 95 % intervals; the band is the interval over all prompts. Without categories the
    single prompts are shown instead. Others are small open marks under the lines."""
    kind = "by category" if m.tau_by_category else "each dot a prompt"
    style(axes, "Tokens per step", f"{kind}, 95 % interval over prompts, bonus included")
    rows = [("all prompts", m.tau), *list(m.tau_by_category.items())[:MAX_CATEGORIES]]
    axes.axvspan(m.tau.low, m.tau.high, color=TEAL, alpha=0.12, linewidth=0)
    axes.axvline(m.tau.value, color=TEAL, alpha=0.55, linewidth=1)
    if m.break_even_tau is not None:
        axes.axvline(m.break_even_tau, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"break-even {m.break_even_tau:.2f}",
            (m.break_even_tau, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=QUIET,
        )
    plate = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    marks = [t.high for _, t in rows] + [m.break_even_tau or 1.0]
    if not m.tau_by_category:
        single = sorted(r.produced / r.rounds for r in m.records if r.rounds)
        # Neighbours in the order are set apart by the golden ratio: spread out, and repeatable.
        heights = [0.15 + 0.5 * (i * 0.618 % 1.0) for i in range(len(single))]
        axes.plot(single, heights, "o", color=BLUE, markersize=5, alpha=0.45, markeredgewidth=0)
        marks += single[-1:]
    for y, (_, tau) in enumerate(rows):
        color = TEAL if y == 0 else BLUE
        axes.plot([tau.low, tau.high], [y, y], color=color, linewidth=2.2, alpha=0.6)
        axes.plot(tau.value, y, "o", color=color, markersize=7 if y else 9)
        axes.annotate(
            f"{tau.value:.2f}",
            (tau.high, y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=INK,
            bbox=plate,
        )
    for (name, other), shape in zip(others.items(), "Ds^v" * len(others), strict=False):
        found = [other.tau, *(other.tau_by_category[key] for key, _ in rows[1:])]
        axes.plot(
            [tau.value for tau in found],
            [y + 0.26 for y in range(len(found))],
            shape,
            color=SAND,
            markerfacecolor="white",
            markersize=5,
            label=name.replace("_", " "),
        )
        marks += [tau.value for tau in found]
    if others:
        axes.legend(fontsize=8.5, labelcolor=INK, loc="lower right", edgecolor="none")
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.4 if len(rows) > 1 else 0.75, -0.9 if len(rows) > 1 else -0.35)
    span = max(marks) - 1.0
    axes.set_xlim(0.97, 1.0 + max(span, 0.2) * 1.16)
    axes.grid(axis="x", color=LINE, linewidth=0.8)


def _time(axes: Axes, m: Pictured, target_ms: float, verify_ms: float) -> None:
    """Stacked bars: where a round's milliseconds go, with and without the drafter."""
    style(
        axes,
        "Time per round",
        "milliseconds of target, drafter, verification and bookkeeping (grey)",
    )
    bars: list[tuple[str, list[tuple[str, float, str]], float]] = []
    if m.plain_ms is not None and m.plain_target_ms is not None:
        rest = m.plain_ms - m.plain_target_ms
        parts = [("target", m.plain_target_ms, BLUE), ("verify", rest, GREY)]
        bars.append(("plain", parts, 1.0))
    parts = [
        ("target", target_ms, BLUE),
        ("draft", m.draft_ms, SAND),
        ("verify", verify_ms, GREY),
    ]
    bars.append(("with drafter", parts, m.tau.value))
    longest = max(sum(ms for _, ms, _ in parts) for _, parts, _ in bars)
    for y, (_, parts, tokens) in enumerate(bars):
        start = 0.0
        for name, ms, color in parts:
            axes.barh(y, ms, left=start, height=0.58, color=color, edgecolor="white")
            label = f"{name} {ms:.1f}" if ms > 0.09 * longest else f"{ms:.1f}"
            if ms > 0.035 * longest:
                axes.text(
                    start + ms / 2,
                    y,
                    label,
                    ha="center",
                    va="center",
                    fontsize=9.5,
                    color="white" if color == BLUE else INK,
                )
            start += ms
        count = "1 token" if tokens == 1.0 else f"{tokens:.2f} tokens"
        note = f"{start:.1f} ms for {count} = {start / tokens:.1f} ms a token"
        axes.text(start + 0.012 * longest, y, note, va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xlim(0, longest * 1.52)
    axes.grid(axis="x", color=LINE, linewidth=0.8)


def _paler(color: str, strength: float) -> tuple[float, float, float]:
    """A colour mixed with white; unlike transparency it hides the grid behind it."""
    red, green, blue = (1 - strength * (1 - c) for c in to_rgb(color))
    return red, green, blue


def style(axes: Axes, title: str, note: str) -> None:
    """A title, a note under it, and no frame but the baseline."""
    axes.set_title(title, loc="left", fontsize=12, weight="bold", color=INK, pad=22)
    axes.annotate(
        note,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        fontsize=9,
        color=QUIET,
    )
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
