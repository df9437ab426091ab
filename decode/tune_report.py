"""A tuning as a table, two sentences and a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from decode.interval import Estimate
from decode.plot import BLUE, INK, LINE, QUIET, SAND, TEAL, style
from decode.tune import Predicted, Tuned
from decode.tune_settings import FIXED

COLORS = {
    FIXED: QUIET,
    "confidence": SAND,
    "svip": TEAL,
    "specdec_pp": BLUE,
    "heuristic": "#9c6ade",
    "dynamic_threshold": "#c44e52",
    "spec_kv": "#4b8f29",
    "exit": "#8c6d31",
    "del_exit": "#d6616b",
}


def tune_table(t: Tuned, *, title: str) -> Table:
    """The best setting of every rule: predicted, and measured where it was. Fits 80 columns."""
    real = {c.words: c for c in t.confirmed.settings}
    what = "measured" if real else "predicted"
    notes = [
        "Predicted and measured: tokens per second of rounds, the prompt's forward",
        "left out. tau: tokens per step. Wasted: drafts that were not kept. Gain:",
        f"{what}, over the best fixed length, prompts paired. Intervals: results.json.",
    ]
    out = Table(
        title=title,
        title_style="bold",
        caption="\n".join(notes),
        caption_style="dim",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    out.add_column("rule", no_wrap=True)
    for name in ("tau", "drafts", "wasted", "predicted"):
        out.add_column(name, justify="right", no_wrap=True)
    if real:
        for name in ("measured", "differs"):
            out.add_column(name, justify="right", no_wrap=True)
    out.add_column("gain", justify="right", no_wrap=True)
    for number, p in enumerate(t.best):
        found = real.get(p.words)
        gain = (found or p).gain.value
        cells = [
            _short(p),
            f"{p.tau.value:.2f}",
            f"{p.drafts_per_step:.2f}",
            f"{p.wasted.value:.0%}",
            f"{found.predicted if found else p.tokens_per_s.value:.1f}",
        ]
        if found is not None:
            cells += [f"{found.measured.value:.1f}", f"{found.ratio.value - 1:+.1%}"]
        out.add_row(*cells, f"{gain - 1:+.1%}", style="" if number else "bold cyan")
    return out


def _short(p: Predicted) -> str:
    """A rule and its own number."""
    if p.rule == FIXED:
        return p.words.removeprefix("tree.")
    numbers = [w.split("=", 1)[1] for w in p.words.split()[1:] if not w.startswith("stop=")]
    name = " ".join([p.rule, *numbers])
    if p.rule == "exit":
        return name + " " + p.words.split()[0].removeprefix("tree.")
    return p.rule if "[" in name else name


def tune_caption(t: Tuned, bench: str) -> str:
    """What it was predicted for, in a line."""
    how = "greedy" if t.temperature == 0 else f"T={t.temperature:g}"
    return (
        f"{bench}: {t.prompts} prompts, {t.tokens} tokens, {how}, at most {t.gamma} drafts, "
        f"{t.dtype} on {t.device}"
    )


def sentences(t: Tuned) -> list[str]:
    """Which is best here, how good the prediction was, and where stopping would pay."""
    best = t.best[0]
    said = (
        f"Best here: {best.words} with {best.tokens_per_s} tokens/s predicted as timed, "
        f"{best.gain.value - 1:+.1%} [{best.gain.low - 1:+.1%}, {best.gain.high - 1:+.1%}] over "
        f"the best fixed length; a draft costs {t.cost.ratio:.3f} of a plain token "
        f"({t.cost.step_ms:.2f} of {t.cost.plain_ms:.1f} ms)."
    )
    found = [said]
    real = t.confirmed.settings
    confirmed = next((c for c in real if c.words == best.words), None)
    if confirmed is not None:
        worst = max(real, key=lambda c: abs(c.ratio.value - 1))
        found.append(
            f"Measured: {confirmed.measured} tokens/s, {_off(confirmed.ratio)} off what was "
            f"predicted for these prompts ({confirmed.predicted:.2f}), of which "
            f"{confirmed.tau_ratio.value - 1:+.1%} because the decoded texts took other steps than "
            f"the traced ones; the widest difference of {len(real)} settings is "
            f"{_off(worst.ratio)} ({worst.rule}). Plain tokens took {t.confirmed.pace - 1:+.1%} "
            "longer while confirming than while timing, which the predictions follow."
        )
    steps = ", ".join(f"{c:g}: {e.value - 1:+.1%} ({w.split('stop=')[1].split()[0]})"
                      for c, e, w in t.sweep)  # fmt: skip
    found.append(
        "Gain of the best rule over the best fixed length were a draft's only cost c plain tokens, "
        f"and looking free: {steps}."
    )
    if t.calibration is not None:
        found.append(
            f"The acceptance head on these prompts: expected calibration error "
            f"{t.calibration.token_after.error:.2%} of tokens, "
            f"{t.calibration.survival_after.error:.2%} of whole drafts."
        )
    return found


def _off(ratio: Estimate) -> str:
    return f"{ratio.value - 1:+.1%} [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"


def tune_plot(t: Tuned, file: Path, *, caption: str) -> None:
    """Every setting: tokens per second over drafts a round, at the pace of confirming where
    something was confirmed; beside it what other pairs would gain from stopping."""
    figure = Figure(figsize=(11.5, 5.2), facecolor="white")
    FigureCanvasAgg(figure)
    best, pace = t.best[0], t.confirmed.pace
    headline = f"{best.tokens_per_s.value / pace:.1f} tokens/s predicted with {best.rule}"
    figure.text(0.03, 0.945, headline, fontsize=18, weight="bold", color=INK, va="center")
    figure.text(0.03, 0.885, caption, fontsize=10, color=QUIET, va="center")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.065, right=0.97, top=0.73, bottom=0.19, wspace=0.2)
    style(left, "Tokens per second", "each dot a setting; stars are measured")
    for rule in dict.fromkeys(p.rule for p in t.settings):
        points = sorted(
            (p.drafts_per_step, p.tokens_per_s.value / pace) for p in t.settings if p.rule == rule
        )
        color = COLORS.get(rule, INK)
        x, y = zip(*points, strict=True)
        left.plot(x, y, "o-", color=color, linewidth=1.4, markersize=4, label=rule)
    drafts = {p.words: p.drafts_per_step for p in t.settings}
    for c in t.confirmed.settings:
        left.plot(
            drafts[c.words], c.measured.value, "*", color=COLORS.get(c.rule, INK), markersize=13
        )
    plain = 1000.0 / t.cost.plain_ms / pace
    left.axhline(plain, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    left.annotate("plain decoding", (0.99, plain),
                  xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8.5,
                  color=QUIET)  # fmt: skip
    left.set_xlabel("drafts a round", fontsize=9.5, color=QUIET)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="lower left",
        bbox_to_anchor=(0.055, 0.005),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        ncols=9,
    )

    style(right, "What stopping would gain elsewhere", "best rule over best fixed length, 95 %")
    ratios = [c for c, _, _ in t.sweep]
    right.plot(ratios, [100 * (e.value - 1) for _, e, _ in t.sweep], "o-", color=BLUE, linewidth=2)
    right.fill_between(
        ratios,
        [100 * (e.low - 1) for _, e, _ in t.sweep],
        [100 * (e.high - 1) for _, e, _ in t.sweep],
        color=BLUE,
        alpha=0.13,
        linewidth=0,
    )
    right.axvline(t.cost.ratio, color=SAND, linewidth=1.5)
    right.annotate("this pair", (t.cost.ratio, 0.97), xycoords=("data", "axes fraction"),
                   xytext=(4, 0), textcoords="offset points", fontsize=8.5, color=QUIET,
                   va="top")  # fmt: skip
    right.axhline(0.0, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    right.set_xscale("log")
    right.set_xlabel("a draft step, in plain tokens of the target", fontsize=9.5, color=QUIET)
    right.set_ylabel("%", fontsize=9.5, color=QUIET)
    for axes in (left, right):
        axes.grid(axis="y", color=LINE, linewidth=0.8)
    figure.savefig(file, dpi=160)
