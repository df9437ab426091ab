"""A replay as a table and a picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from decode.plot import BLUE, INK, LINE, QUIET, SAND, TEAL, style
from decode.replay import ChainResult, Replayed
from decode.replay_trees import TreeReplayed


def replay_table(r: Replayed, *, title: str) -> Table:
    """One row for every chain length, the best one marked."""
    out = Table(title=title, title_style="bold", caption=_notes(r), caption_style="dim")
    out.add_column("gamma", justify="right")
    out.add_column("tokens per step", justify="right", no_wrap=True)
    out.add_column("accepted by depth", no_wrap=True)
    out.add_column("MBSU", justify="right")
    if r.chains[0].timing:
        out.add_column("ms a round", justify="right", no_wrap=True)
        out.add_column("break-even", justify="right")
        out.add_column("predicted speed-up", justify="right", no_wrap=True)
    for chain in r.chains:
        best = chain.gamma == r.best_gamma
        alphas = " ".join(f"{a:.2f}" for a in chain.alpha_by_depth)
        cells = [f"{chain.gamma}", str(chain.tau), alphas, f"{chain.mbsu:.2f}"]
        out.add_row(*cells, *_speed_cells(chain), style="bold cyan" if best else None)
    return out


def _speed_cells(chain: ChainResult) -> list[str]:
    t = chain.timing
    if t is None:
        return []
    parts = f"{t.draft_ms:.1f} + {t.target_ms:.1f} + {t.verify_ms:.1f}"
    return [parts, f"{t.break_even_tau:.2f}", str(chain.speedup)]


def _notes(r: Replayed) -> str:
    lines = [
        "Tokens per step: per target forward after the prompt, bonus token included.",
        f"Every token as a first draft: {r.acceptance} accepted.",
    ]
    if r.chains[0].timing:
        lines += [
            "A round is draft + target + verification; break-even is the tokens per step for a "
            "speed-up of 1,",
            "and the prediction is their ratio: short decodings of each length, prompts left out.",
        ]
    return "\n".join(lines)


def replay_caption(r: Replayed, bench: str) -> str:
    """What the numbers were computed on, in a line that every figure carries."""
    how = "greedy" if r.temperature == 0 else f"T={r.temperature:g}"
    if r.draft_temperature != r.temperature:
        how += f", drafts at T={r.draft_temperature:g}"
    answers = f" x {r.samples} answers" if r.samples > 1 else ""
    return (
        f"{bench}: {r.prompts} prompts{answers}, {r.tokens} tokens, {how}, chains replayed, "
        f"seed {r.seed}, {r.dtype} on {r.device}"
    )


def best_sentence(r: Replayed) -> str:
    """The chain length to use, and whether it pays."""
    best = r.chain(r.best_gamma)
    if best.speedup is None or best.break_even_tau is None:
        return (
            f"Best chain if reading weights were the only cost: gamma={best.gamma}, "
            f"{best.tau} tokens per step, MBSU {best.mbsu:.2f}."
        )
    if best.speedup.value > 1.0:
        return (
            f"Best chain: gamma={best.gamma}, {best.tau} tokens per step where "
            f"{best.break_even_tau:.2f} would break even: {best.speedup}x predicted."
        )
    return (
        f"No chain pays here: the best, gamma={best.gamma}, gives {best.tau} tokens per step and "
        f"needs {best.break_even_tau:.2f} to break even ({best.speedup}x predicted)."
    )


def tree_table(r: TreeReplayed, *, title: str) -> Table:
    """The headline numbers of one shape, each with its definition, as of a real decoding."""
    out = Table(title=title, title_style="bold", show_header=False, padding=(0, 1))
    out.add_column(style="cyan", no_wrap=True)
    out.add_column(justify="right", no_wrap=True)
    out.add_column(style="dim")
    alphas = "  ".join(f"{a:.2f}" for a in r.alpha_by_depth)
    verified = f"{r.nodes_per_round:.0f} tokens verified a round; lossless acceptance"
    out.add_row("tokens per step", str(r.tau), "per target forward, bonus token included")
    out.add_row("acceptance by depth", alphas, "share accepted of those reached")
    out.add_row("draft", r.shape, verified)
    out.add_row("drafting", f"{r.drafting_ms:.1f} ms", f"per round, over {r.rounds:,} rounds")
    t = r.timing
    if t is not None:
        whole = t.draft_ms + t.target_ms + t.verify_ms
        split = (
            f"draft {t.draft_ms:.1f} + target {t.target_ms:.1f} + verification and bookkeeping "
            f"{t.verify_ms:.1f}, of short real decodings"
        )
        out.add_row("time per round", f"{whole:.1f} ms", split)
        out.add_row("plain decoding", f"{t.plain_ms:.1f} ms", "per token, same decoder, same run")
        out.add_row("break-even", f"{t.break_even_tau:.2f}", "tokens per step for a speed-up of 1")
        out.add_row("predicted speed-up", str(r.speedup), "tokens per step / break-even")
    out.add_row("MBSU", f"{r.mbsu:.2f}", "speed-up if reading weights were the only cost")
    for name, tau in r.tau_by_category.items():
        out.add_row(f"  {name}", str(tau), "tokens per step")
    return out


def tree_caption(r: TreeReplayed, bench: str) -> str:
    """What the numbers were computed on."""
    how = "greedy" if r.temperature == 0 else f"T={r.temperature:g}"
    answers = f" x {r.samples} answers" if r.samples > 1 else ""
    return (
        f"{bench}: {r.prompts} prompts{answers}, {r.tokens} tokens, {how}, {r.shape} replayed, "
        f"seed {r.seed}, {r.dtype} on {r.device}"
    )


def replay_plot(r: Replayed, file: Path, *, caption: str) -> None:
    """Tokens per step over the chain length; beside it the speed-up, predicted and bound."""
    figure = Figure(figsize=(11.5, 4.8), facecolor="white")
    FigureCanvasAgg(figure)
    best = r.chain(r.best_gamma)
    headline = f"{best.tau.value:.2f} tokens per step with {best.gamma} drafts a round"
    figure.text(0.03, 0.94, headline, fontsize=18, weight="bold", color=INK, va="center")
    figure.text(0.03, 0.875, caption, fontsize=10, color=QUIET, va="center")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.965, top=0.7, bottom=0.12, wspace=0.22)
    gammas = [c.gamma for c in r.chains]

    style(left, "Tokens per step", "95 % interval over prompts, bonus included")
    _line(left, gammas, [c.tau.value for c in r.chains], BLUE, "tokens per step")
    left.fill_between(
        gammas,
        [c.tau.low for c in r.chains],
        [c.tau.high for c in r.chains],
        color=BLUE,
        alpha=0.13,
        linewidth=0,
    )
    style(right, "Speed-up over plain decoding", "1.0 is where the drafter begins to pay")
    _line(right, gammas, [c.mbsu for c in r.chains], TEAL, "MBSU: only reading weights costs")
    right.axhline(1.0, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    timed = [c for c in r.chains if c.timing and c.speedup]
    if timed:
        even = [c.break_even_tau or 0.0 for c in timed]
        _line(left, [c.gamma for c in timed], even, SAND, "needed to break even")
        speeds = [c.speedup.value for c in timed if c.speedup]
        _line(right, [c.gamma for c in timed], speeds, BLUE, "predicted from timed rounds")
    for axes in (left, right):
        axes.set_xticks(gammas)
        axes.set_xlabel("drafts a round (gamma)", fontsize=9.5, color=QUIET)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(file, dpi=160)


def _line(axes: Axes, x: list[int], y: list[float], color: str, label: str) -> None:
    axes.plot(x, y, "o-", color=color, linewidth=2, markersize=5.5, label=label)
