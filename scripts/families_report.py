"""A comparison of runs as Markdown tables, a CSV file and a picture."""

import csv
import io
import json
import shlex
from collections.abc import Sequence
from typing import Any

from decode.interval import Estimate
from scripts.families_cells import OWN, Store
from scripts.families_plot import plot
from scripts.families_scores import Comparison, load, unique

DEFINITIONS = """\
- **tokens per step**: tokens produced per target forward after the prompt, bonus token included
  (1.00 is plain decoding), with a 95 % bootstrap interval over prompts. Runs are replayed on the
  same recorded answers of the target, which is exact (decode/rounds.py, decode/walk.py).
- **chain**: drafts in a row; sampled from q when T > 0, and verified by rejection. A family that
  makes fewer drafts is marked with its longest chain.
- **other shapes**: draft trees of the drafter's best tokens, at every T.
- **own**: the drafts of a method that needs no training. Token Recycling is decoded, since it
  learns from refused drafts; at T > 0 on answers drawn anew.
- **less <run>, prompt by prompt**: the difference of tokens per step on the same answers, with a
  95 % bootstrap interval over prompts drawn for both at once; bold where it leaves out 0.
- **accepted by depth**: share of the chain's depth-k drafts accepted of those reached.
- **MBSU**: tokens per step * c / (c + d), c and d the weight bytes read by a target forward and by
  a draft: the speed-up if reading weights were the only cost.
- **predicted speed-up**: tokens per step / break-even, the tokens per step at which a round takes
  as long as so many plain tokens; a round's time is that of short real decodings, plain ones beside
  them, the prompt's forward left out.
"""


def write_report(store: Store, beside: str | None = None) -> None:
    """table.md, categories.md, table.csv and tau.png; each appears whole or not at all."""
    c = load(store, beside)
    settings = json.loads((store.out / "settings.json").read_text())
    _replace(store, "table.md", markdown(c, settings))
    _replace(store, "categories.md", categories(c))
    _replace(store, "table.csv", table_csv(c))
    picture = store.out / "tau.tmp.png"
    plot(c, picture)
    picture.replace(store.out / "tau.png")


def markdown(c: Comparison, settings: dict[str, Any]) -> str:
    """Training, tokens per step, time: one table of each kind."""
    length = settings["max_new_tokens"]
    intro = f"Answers of at most {length} tokens, seed {settings['seed']}, " + ", ".join(
        unique(f"{e['target']} in {e['dtype']} on {e['device']}" for e in c.entries.values())
    )
    lines = [intro + ".", "", DEFINITIONS, *_training(c)]
    for temperature in c.temperatures:
        for bench in c.benches:
            lines += _tau_table(c, bench, temperature)
        lines += _time_table(c, temperature)
    return "\n".join(lines)


def _training(c: Comparison) -> list[str]:
    head = (
        "run", "drafter", "trained parameters", "of the target", "draft vocabulary", "minutes",
        "answer tokens/s", "steps", "command",
    )  # fmt: skip
    rows = []
    for label in c.labels:
        e = c.entries[label]
        if e["run"] is None:
            continue
        d, seconds, learned = e["drafter"], e["train_seconds"], e["tokens_learned"]
        trained = d.get("trained", d.get("parameters"))
        vocabulary = "all"
        if d.get("draft_vocab_size"):
            vocabulary = f"{d['draft_vocab_size']:,} ({d.get('coverage', 0.0):.1%} of the answers)"
        minutes, speed = "", ""
        if seconds:
            minutes = f"{seconds / 60:.1f}" + (" (resumed: its last part)" if e["resumed"] else "")
            if learned and not e["resumed"]:
                speed = f"{learned / seconds:,.0f}"
        rows.append(
            (
                label,
                d["class"],
                f"{trained / 1e6:.2f} M" if trained else "",
                f"{trained / e['target_parameters']:.1%}" if trained else "",
                vocabulary,
                minutes,
                speed,
                f"{e['steps']:,}" if e["steps"] else "",
                f"`{shlex.join(e['command'])}`" if e["command"] else "",
            )
        )
    return ["### Training", "", *_rows(head, rows)]


def _panel(c: Comparison, bench: str, temperature: float) -> str:
    """What the numbers were measured on."""
    some = [s for s in c.scores.values() if (s.bench, s.temperature) == (bench, temperature)]
    prompts = unique(str(s.prompts) for s in some)
    samples = max(s.samples for s in some)
    answers = f" x {samples} answers" if samples > 1 else ""
    replayed = unique(f"{s.tokens:,}" for s in some if s.shape != OWN)
    tokens = f", {' / '.join(replayed)} tokens" if replayed else ""
    return f"{bench}, T={temperature:g} ({' / '.join(prompts)} prompts{answers}{tokens})"


def _tau_table(c: Comparison, bench: str, temperature: float) -> list[str]:
    there = {s for _, b, t, s in c.scores if (b, t) == (bench, temperature)}
    shapes = [s for s in c.shapes if s in there]
    if not shapes:
        return []
    titles = {s: c.title(s) for s in shapes}
    head = ("run", *titles.values(), "chain accepted by depth", "MBSU: " + ", ".join(shapes))
    rows = []
    tops = {
        s: max(
            x.tau.value
            for x in c.scores.values()
            if (x.bench, x.temperature, x.shape) == (bench, temperature, s)
        )
        for s in shapes
    }
    for label in c.labels:
        found = [c.score(label, bench, temperature, s) for s in shapes]
        if not any(found):
            continue
        chain = c.score(label, bench, temperature, "chain")
        cells = []
        for shape, score in zip(shapes, found, strict=True):
            text = ""
            if score is not None:
                text = str(score.tau)
                if score.tau.value == tops[shape] and shape != OWN:
                    text = f"**{text}**"
                if score.drafts != titles[shape]:
                    text += f" ({score.drafts})"
            cells.append(text)
        alphas = " ".join(f"{a:.2f}" for a in chain.alpha) if chain else ""
        mbsu = ", ".join(f"{s.mbsu:.2f}" for s in found if s is not None)
        rows.append((label, *cells, alphas, mbsu))
    name = _panel(c, bench, temperature)
    lines = [f"### Tokens per step: {name}", "", *_rows(head, rows)]
    return lines + _difference_table(c, bench, temperature, titles)


def _difference_table(
    c: Comparison, bench: str, temperature: float, titles: dict[str, str]
) -> list[str]:
    """Every run less the one it is compared with; bold where the interval leaves out 0."""
    shapes = [s for s in titles if s != OWN and c.score(c.beside, bench, temperature, s)]
    rows = []
    for label in c.labels:
        scores = [c.score(label, bench, temperature, s) for s in shapes]
        found = [c.difference(score) if score else None for score in scores]
        if any(found):
            rows.append((label, *(_signed(d) if d else "" for d in found)))
    if not rows:
        return []
    head = (f"less {c.beside}, prompt by prompt", *(titles[s] for s in shapes))
    return _rows(head, rows)


def _signed(d: Estimate) -> str:
    text = f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
    return text if d.low <= 0.0 <= d.high else f"**{text}**"


def _time_table(c: Comparison, temperature: float) -> list[str]:
    """One row for every run and shape."""
    head = (
        "run", "draft", "drafter ms a round (all replayed)", "timed: draft + target + rest ms",
        "plain ms a token", "break-even", *(f"predicted speed-up, {b}" for b in c.benches),
    )  # fmt: skip
    rows = []
    for label in c.labels:
        for shape in c.shapes:
            found = [c.score(label, bench, temperature, shape) for bench in c.benches]
            timing = c.timings.get((label, temperature, shape))
            walked = [s.drafting_ms for s in found if s is not None and s.drafting_ms is not None]
            if timing is None and not walked:
                continue
            names = [s.drafts for s in found if s is not None]
            parts = plain = even = ""
            if timing is not None:
                parts = f"{timing.draft_ms:.1f} + {timing.target_ms:.1f} + {timing.verify_ms:.1f}"
                plain, even = f"{timing.plain_ms:.1f}", f"{timing.break_even_tau:.2f}"
            speeds = [c.speedup(s) if s is not None else None for s in found]
            rows.append(
                (
                    label, names[0] if names else shape,
                    f"{sum(walked) / len(walked):.1f}" if walked else "", parts, plain, even,
                    *("" if speed is None else str(speed) for speed in speeds),
                )
            )  # fmt: skip
    name = f"### Time of a round, T={temperature:g}"
    return [name, "", *_rows(head, rows)] if rows else []


def categories(c: Comparison) -> str:
    """Tokens per step of every category: one table for each bench, temperature and shape."""
    lines = ["Tokens per step with 95 % intervals over the prompts of a category.", ""]
    for bench in c.benches:
        for temperature in c.temperatures:
            for shape in c.shapes:
                found = [c.score(x, bench, temperature, shape) for x in c.labels]
                some = [s for s in found if s is not None and s.categories]
                names = sorted(unique(k for s in some for k in s.categories))
                if not names:
                    continue
                rows = [
                    (s.label, str(s.tau), *(str(s.categories.get(k, "")) for k in names))
                    for s in some
                ]
                lines += [f"### {_panel(c, bench, temperature)}, {c.title(shape)}", ""]
                lines += _rows(("run", "all", *(n.replace("_", " ") for n in names)), rows)
    return "\n".join(lines)


def table_csv(c: Comparison) -> str:
    """One line for every cell, and one for every category of it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        (
            "run", "bench", "T", "shape", "drafts", "category", "prompts", "samples", "tokens",
            "tau", "tau_low", "tau_high", "alpha_by_depth", "mbsu", "drafting_ms",
            "timed_draft_ms", "break_even", "speedup", "beside", "difference", "difference_low",
            "difference_high",
        )
    )  # fmt: skip
    order = {label: i for i, label in enumerate(c.labels)}
    for s in sorted(
        c.scores.values(), key=lambda s: (s.bench, s.temperature, s.shape, order[s.label])
    ):
        timing, speed = c.timings.get((s.label, s.temperature, s.shape)), c.speedup(s)
        d = c.difference(s)
        less = [c.beside, *(f"{x:.4f}" for x in (d.value, d.low, d.high))] if d else [""] * 4
        for category, tau in {"": s.tau, **s.categories}.items():
            numbers = [f"{x:.4f}" for x in (tau.value, tau.low, tau.high)]
            writer.writerow(
                (
                    s.label, s.bench, f"{s.temperature:g}", s.shape, s.drafts, category, s.prompts,
                    s.samples, s.tokens, *numbers, " ".join(f"{a:.4f}" for a in s.alpha),
                    f"{s.mbsu:.4f}", "" if s.drafting_ms is None else f"{s.drafting_ms:.3f}",
                    f"{timing.draft_ms:.3f}" if timing else "",
                    f"{timing.break_even_tau:.4f}" if timing else "",
                    f"{speed.value:.4f}" if speed else "",
                    *less,
                )
                if not category
                else (
                    s.label, s.bench, f"{s.temperature:g}", s.shape, s.drafts, category, "", "", "",
                    *numbers, *[""] * 10,
                )
            )  # fmt: skip
    return out.getvalue()


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _replace(store: Store, name: str, text: str) -> None:
    fresh = store.out / f"{name}.tmp"
    fresh.write_text(text)
    fresh.replace(store.out / name)
