"""What trimming a vocabulary gives: rows, a table and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from decode.answers import Recording
from decode.interval import Estimate, bootstrap, tau_parts
from decode.plot import BLUE, INK, LINE, QUIET, SAND, TEAL, style
from decode.replay import ReplayRecord, replay
from models.drafter.base import Drafter
from models.target import Target


@dataclass(frozen=True)
class Row:
    """A drafter with one draft vocabulary, on the recorded answers.

    `coverage` is the share of the counted tokens of `data` that lie inside, `answers_coverage` that
    of the recorded answers. `tau_ratio` is tokens per step by those before trimming (paired).
    """

    data: str
    size: int
    coverage: float | None
    answers_coverage: float
    tau: Estimate
    tau_ratio: Estimate
    draft_bytes: float
    mbsu: float
    records: list[ReplayRecord]


@dataclass(frozen=True)
class Trimming:
    """All rows of one drafter: `whole` as it was trained, the others trimmed."""

    bench: str
    gamma: int
    whole: Row
    rows: list[Row]

    @property
    def best(self) -> Row:
        """The highest MBSU; of equal ones the drafter as it is, then the smaller vocabulary."""
        return max([self.whole, *self.rows], key=lambda row: row.mbsu)

    def best_of(self, size: int) -> Row:
        """The best way to choose so many tokens."""
        return max((row for row in self.rows if row.size == size), key=lambda row: row.mbsu)

    @property
    def caption(self) -> str:
        """What the numbers were computed on."""
        tokens = sum(r.new_tokens for r in self.whole.records)
        return (
            f"{self.bench}: {len(self.whole.records)} prompts, {tokens} tokens, greedy, "
            f"chain{self.gamma} replayed"
        )


def measure_row(
    target: Target,
    drafter: Drafter,
    recording: Recording,
    *,
    gamma: int,
    data: str = "",
    coverage: float | None = None,
    whole: Row | None = None,
) -> Row:
    """Replay a drafter. Without `whole` it is the one the others are compared with."""
    chain = replay(target=target, drafter=drafter, recording=recording, gammas=[gamma]).chain(gamma)
    inside = None if drafter.draft_ids_D is None else set(drafter.draft_ids_D.tolist())
    tokens = [token for answer in recording.answers for token in answer.tokens]
    pairs = list(zip(chain.records, whole.records if whole else chain.records, strict=True))
    return Row(
        data=data,
        size=drafter.draft_vocab_size or drafter.vocab_size,
        coverage=coverage,
        answers_coverage=sum(inside is None or t in inside for t in tokens) / len(tokens),
        tau=chain.tau,
        tau_ratio=bootstrap(pairs, lambda pair: (*tau_parts(pair[0]), *tau_parts(pair[1]))),
        draft_bytes=chain.draft_bytes,
        mbsu=chain.mbsu,
        records=chain.records,
    )


def trim_table(found: Trimming) -> Table:
    """One line a vocabulary, the best marked."""
    out = Table(
        title=found.caption,
        title_style="bold",
        caption=_NOTES,
        caption_style="dim",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    out.add_column("vocabulary", justify="right", no_wrap=True)
    out.add_column("counted in", overflow="fold")
    for name in ("covers", "answers", "tokens per step", "kept", "MB", "MBSU"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in [found.whole, *found.rows]:
        out.add_row(
            f"{row.size:,}",
            Path(row.data).name or "as trained",
            "" if row.coverage is None else f"{row.coverage:.2%}",
            f"{row.answers_coverage:.2%}",
            str(row.tau),
            f"{row.tau_ratio.value:.1%}",
            f"{row.draft_bytes / 1e6:.1f}",
            f"{row.mbsu:.3f}",
            style="bold cyan" if row is found.best else None,
        )
    return out


_NOTES = (
    "Covers: share of the counted tokens; answers: of the recorded answers.\n"
    "Tokens per step: per target forward after the prompt, bonus token included;\n"
    "kept: of those before trimming. MB: weights read by a draft.\n"
    "MBSU: speed-up if reading weights were the only cost."
)


def best_sentence(found: Trimming) -> str:
    """The vocabulary to use, and whether trimming pays."""
    best, whole = found.best, found.whole
    if best is whole:
        return (
            f"No size pays: as trained, {whole.size:,} tokens give an MBSU of {whole.mbsu:.3f}; "
            f"the best trimmed one has {max(row.mbsu for row in found.rows):.3f}. Nothing is "
            "written unless size= names one."
        )
    return (
        f"Best by MBSU: the {best.size:,} most frequent tokens of {best.data}, {best.mbsu:.3f} "
        f"against {whole.mbsu:.3f} as trained, with {best.tau_ratio.value:.1%} of its tokens per "
        "step."
    )


def trim_plot(found: Trimming, file: Path) -> None:
    """Tokens per step and MBSU over the vocabulary's size, a line for each counted text."""
    figure = Figure(figsize=(11.5, 4.8), facecolor="white")
    FigureCanvasAgg(figure)
    best = found.best
    figure.text(
        0.03,
        0.94,
        f"MBSU {best.mbsu:.2f} with {best.size:,} of {found.whole.size:,} draft tokens",
        fontsize=18,
        weight="bold",
        color=INK,
        va="center",
    )
    figure.text(0.03, 0.875, found.caption, fontsize=10, color=QUIET, va="center")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.965, top=0.7, bottom=0.15, wspace=0.22)
    style(left, "Tokens per step", "95 % interval over prompts, bonus included")
    style(right, "MBSU", "speed-up if reading weights were the only cost")
    names = list(dict.fromkeys(row.data for row in found.rows))
    for name, color in zip(names, (TEAL, SAND, BLUE, QUIET) * len(names), strict=False):
        rows = [row for row in found.rows if row.data == name]
        sizes = [row.size for row in rows]
        left.fill_between(
            sizes, [r.tau.low for r in rows], [r.tau.high for r in rows], color=color, alpha=0.12
        )
        left.plot(sizes, [r.tau.value for r in rows], "o-", color=color, label=f"counted in {name}")
        right.plot(sizes, [r.mbsu for r in rows], "o-", color=color)
    for axes, value in ((left, found.whole.tau.value), (right, found.whole.mbsu)):
        axes.axhline(
            value,
            color=QUIET,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label=f"as trained ({found.whole.size:,})",
        )
        _sizes_below(axes, [row.size for row in found.rows])
    if best is not found.whole:
        right.plot(best.size, best.mbsu, "o", color=INK, markersize=11, fillstyle="none")
        # Towards the middle of the picture, so that it stays inside.
        leftmost = best.size <= sorted(row.size for row in found.rows)[len(found.rows) // 2]
        right.annotate(
            f"best: {best.size:,}, {best.mbsu:.2f}",
            (best.size, best.mbsu),
            xytext=(10 if leftmost else -10, 9),
            textcoords="offset points",
            ha="left" if leftmost else "right",
            fontsize=9.5,
            color=INK,
        )
        low, high = right.get_ylim()
        right.set_ylim(low, high + 0.12 * (high - low))
    left.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    figure.savefig(file, dpi=160)


def _sizes_below(axes: Axes, sizes: Sequence[int]) -> None:
    ticks = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens in the draft vocabulary", fontsize=9.5, color=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
