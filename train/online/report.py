"""What a stream gave, as numbers and as a picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decode.interval import Estimate, bootstrap
from decode.plot import BLUE, GREY, INK, LINE, QUIET, SAND, TEAL, style
from train.online.acceptance import Rounds
from train.online.stream import Event, Record


def summary(records: Sequence[Record], events: Sequence[Event]) -> dict[str, Any]:
    """Tokens per step of the whole stream, of its second half and of each benchmark in it."""
    decisions = [e.decision["decision"] for e in events]
    parts = {"all": list(records), "second_half": list(records)[len(records) // 2 :]}
    benches = list(dict.fromkeys(r.bench for r in records))
    if len(benches) > 1:
        parts |= {bench: [r for r in records if r.bench == bench] for bench in benches}
    return {
        "prompts": len(records),
        "tokens": sum(r.tokens for r in records),
        "decisions": {name: decisions.count(name) for name in ("swapped", "kept", "reset")},
        "parts": {name: _part(chosen) for name, chosen in parts.items()},
    }


def _part(records: Sequence[Record]) -> dict[str, Any]:
    """`gain` is tokens per step over those of the frozen drafter on the same prompts."""
    found: dict[str, Any] = {"online": asdict(online_tau(records))}
    if all(r.frozen is not None for r in records):
        found["frozen"] = asdict(bootstrap(records, _frozen_parts))
        found["gain"] = asdict(bootstrap(records, lambda r: (*_parts(r), *_frozen_parts(r))))
    return found


def online_tau(records: Sequence[Record]) -> Estimate:
    """Tokens per step as served, with its 95 % interval over prompts."""
    return bootstrap(records, _parts)


def _parts(r: Record) -> tuple[float, ...]:
    return r.tokens - 1, r.served.rounds


def _frozen_parts(r: Record) -> tuple[float, ...]:
    return r.tokens - 1, 0.0 if r.frozen is None else r.frozen.rounds


def as_rows(records: Sequence[Record], events: Sequence[Event]) -> dict[str, Any]:
    """Every prompt and every decision, for json (which has no nan: null)."""
    rows = []
    for n, r in enumerate(records):
        row = {"n": n, **asdict(r), "tokens_per_step": _tau([r], "served")}
        rows.append(row | {"acceptance": _acceptance([r], "served")})
    return _without_nan({"prompts": rows, "events": [asdict(e) for e in events]})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the picture ----------------------------------------------------------------------------------


def smoothing(prompts: int) -> int:
    """Prompts in the running mean."""
    return max(1, min(32, prompts // 8))


def plot(
    records: Sequence[Record], events: Sequence[Event], file: Path, *, title: str, caption: str
) -> None:
    """Draw acceptance and tokens per step over the stream as a PNG."""
    figure = Figure(figsize=(11.5, 7.2), facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.07, right=0.965, top=0.78, bottom=0.085, hspace=0.42)
    figure.text(0.03, 0.955, title, fontsize=17, weight="bold", color=INK, va="center")
    figure.text(0.03, 0.91, caption, fontsize=10, color=QUIET, va="center")
    size = smoothing(len(records))
    window = f"running mean over {size} prompts" if size > 1 else "each prompt"
    note = f"{window}; vertical lines: updated drafter swapped in"
    for axes, name, value in (
        (upper, "Acceptance", _acceptance),
        (lower, "Tokens per step", _tau),
    ):
        style(axes, name, note)
        note = f"{window}; bonus token included"
        for which, color, label in (
            ("frozen", GREY, "first drafter, frozen"),
            ("served", BLUE, "online"),
        ):
            if any(getattr(r, which) is None for r in records):
                continue
            ends = range(1, len(records) + 1)
            line = [value(records[max(0, end - size) : end], which) for end in ends]
            axes.plot(ends, line, color=color, linewidth=2.2, label=label)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.margins(y=0.12)
        _marks(axes, records, events)
    upper.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=4, frameon=False, fontsize=9.5)
    lower.set_xlim(1, max(2, len(records)))
    lower.set_xlabel("prompts served", color=INK, fontsize=9.5)
    figure.savefig(file, dpi=160)


def _marks(axes: Axes, records: Sequence[Record], events: Sequence[Event]) -> None:
    for event in events:
        what = event.decision["decision"]
        if what == "swapped":
            axes.axvline(event.after, color=TEAL, linewidth=1, alpha=0.55)
    resets = [e.after for e in events if e.decision["decision"] == "reset"]
    if resets:
        axes.plot(
            resets,
            [0.03] * len(resets),
            "x",
            color=SAND,
            markeredgewidth=2,
            transform=axes.get_xaxis_transform(),
            label="update thrown away",
        )
    start = 0
    groups = [(bench, len(list(group))) for bench, group in groupby(records, lambda r: r.bench)]
    for bench, count in groups if len(groups) > 1 else []:
        if start:
            axes.axvline(start + 0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            bench,
            (start + 1, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            va="top",
            fontsize=9.5,
            color=INK,
        )
        start += count


def _tau(records: Sequence[Record], which: str) -> float:
    """Tokens per step of some prompts; nan where all ended with their first token."""
    rounds = sum(_of(r, which).rounds for r in records)
    return sum(r.tokens - 1 for r in records) / rounds if rounds else math.nan


def _acceptance(records: Sequence[Record], which: str) -> float:
    """Drafts accepted, of those tested."""
    tested = sum(_of(r, which).tested for r in records)
    return sum(_of(r, which).accepted for r in records) / tested if tested else math.nan


def _of(record: Record, which: str) -> Rounds:
    return getattr(record, which)
