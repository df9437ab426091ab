"""A measurement as a table, a JSON file and a picture."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from decode.measurement import Beside, Measurement
from decode.plot import plot


def table(m: Measurement, *, title: str) -> Table:
    """The headline numbers, each with its definition."""
    out = Table(title=title, title_style="bold", show_header=False, padding=(0, 1))
    out.add_column(style="cyan", no_wrap=True)
    out.add_column(justify="right", no_wrap=True)
    out.add_column(style="dim")
    for name, value, meaning in _rows(m):
        out.add_row(name, value, meaning)
    return out


def _rows(m: Measurement) -> list[tuple[str, str, str]]:
    rule = "LOSSY acceptance" if m.lossy else "lossless acceptance"
    alphas = "  ".join(f"{a:.2f}" for a in m.alpha_by_depth)
    rows = [
        ("tokens per step", str(m.tau), "per target forward, bonus token included"),
        ("acceptance by depth", alphas, "share accepted of those reached"),
        *_siblings(m),
        ("draft", m.shape, f"{m.nodes_per_round:.0f} tokens verified a round; {rule}"),
        ("time per round", f"{m.draft_ms + m.target_ms + m.verify_ms:.1f} ms", _split(m)),
    ]
    if m.speedup is not None and m.break_even_tau is not None:
        rows += [
            ("plain decoding", f"{m.plain_ms:.1f} ms", "per token, same decoder, same run"),
            ("speed-up", f"{m.speedup}", _rates(m)),
            ("break-even", f"{m.break_even_tau:.2f}", "tokens per step for a speed-up of 1"),
        ]
    if m.lossless is not None:
        same = f"{m.lossless.identical} of {m.lossless.prompts}"
        rows.append(("identical answers", same, "greedy, with and without the drafter"))
    rows.append(("MBSU", f"{m.mbsu:.2f}", "speed-up if reading weights were the only cost"))
    for name, other in m.beside.items():
        rows += [(name, str(other.measured.tau), _beside(other))]
    for name, tau in m.tau_by_category.items():
        others = [
            f"{method} {other.measured.tau_by_category[name].value:.2f}"
            for method, other in m.beside.items()
        ]
        rows.append((f"  {name}", str(tau), "; ".join(["tokens per step", *others])))
    return rows


def _siblings(m: Measurement) -> list[tuple[str, str, str]]:
    """What the rule accepts of the root's siblings, beside what any lossless rule could."""
    if m.siblings is None:
        return []
    most = "the most" if m.siblings.replacement else "at most what"
    meaning = f"of the root's siblings; {most} any lossless rule could is {m.siblings.optimum}"
    return [("accepted at once", str(m.siblings.rule), meaning)]


def _beside(other: Beside) -> str:
    """A method without training in words, and how the drafter compares with it."""
    m = other.measured
    speed = "" if m.speedup is None else f", speed-up {m.speedup}"
    ratios = f"{other.tau_ratio.value:.2f}x the tokens, {other.speed_ratio.value:.2f}x the speed"
    return f"{m.shape}, no training: tokens per step{speed}; the drafter has {ratios}"


def _split(m: Measurement) -> str:
    return (
        f"draft {m.draft_ms:.1f} + target {m.target_ms:.1f} + "
        f"verification and bookkeeping {m.verify_ms:.1f}"
    )


def _rates(m: Measurement) -> str:
    return f"{m.tokens_per_s:.1f} against {m.plain_tokens_per_s:.1f} tokens/s, prompts included"


def caption(m: Measurement, bench: str) -> str:
    """What the numbers were measured on, in a line that every figure carries."""
    how = "greedy" if m.temperature == 0 else f"T={m.temperature:g}"
    if m.top_p < 1:
        how += f", top-p {m.top_p:g}"
    return (
        f"{bench}: {m.prompts} prompts, {m.tokens} tokens, {how}, {m.shape}, seed {m.seed}, "
        f"{m.dtype} on {m.device}"
    )


def write(folder: Path, m: Measurement, *, bench: str, facts: dict[str, Any]) -> Path:
    """Write results.json and plot.png of a measurement into `folder`, or beside it if it exists."""
    results = {"bench": bench, **facts, **m.as_dict()}
    others = {name: other.measured for name, other in m.beside.items()}
    return write_folder(
        folder,
        results,
        draw=lambda file: plot(m, file, caption=caption(m, bench), others=others),
    )


def write_folder(folder: Path, results: dict[str, Any], *, draw: Callable[[Path], None]) -> Path:
    """Write results.json and plot.png into `folder`, or into `folder`-2, -3, ... if it exists.

    Nothing is overwritten, and a folder appears only when it is complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        (temporary / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        draw(temporary / "plot.png")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private
        return _settle(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(temporary: Path, folder: Path) -> Path:
    """Rename to the first free number. Renaming onto a non-empty folder fails, so two processes
    that finish together cannot take the same one."""
    number = 1
    while True:
        chosen = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not chosen.exists():
            try:
                return temporary.rename(chosen)
            except OSError:
                if not chosen.exists():
                    raise
        number += 1
