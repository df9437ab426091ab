"""The numbers of a comparison, read back from its cells."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from decode.interval import Estimate, paired_difference
from decode.replay import Timing
from scripts.families_cells import OWN, Store

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """One cell."""

    label: str
    bench: str
    temperature: float
    shape: str
    drafts: str
    prompts: int
    samples: int
    tokens: int
    tau: Estimate
    categories: dict[str, Estimate]
    alpha: list[float]
    mbsu: float
    drafting_ms: float | None
    by_prompt: dict[str, tuple[float, float]]
    """Tokens produced and the target forwards that made them, of every prompt (and answer)."""

    @staticmethod
    def of(label: str, cell: dict[str, Any]) -> "Score":
        result = cell["result"]
        return Score(
            label=label,
            bench=cell["bench"],
            temperature=cell["temperature"],
            shape=cell["shape"],
            drafts=cell["drafts"],
            prompts=result["prompts"],
            samples=cell["samples"],
            tokens=result["tokens"],
            tau=Estimate(**result["tau"]),
            categories={k: Estimate(**v) for k, v in result["tau_by_category"].items()},
            alpha=result["alpha_by_depth"],
            mbsu=result["mbsu"],
            drafting_ms=result.get("drafting_ms", result.get("draft_ms")),
            by_prompt={
                f"{r['id']} {i}": (r["produced"], r["rounds"])
                for i, r in enumerate(result["records"])
            },
        )


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured so far. Labels are ordered by what they give in the last shape
    on the first bench at the lowest temperature, methods without training last."""

    labels: list[str]
    entries: dict[str, dict[str, Any]]
    shapes: list[str]
    benches: list[str]
    temperatures: list[float]
    scores: dict[tuple[str, str, float, str], Score]
    timings: dict[tuple[str, float, str], Timing]
    beside: str
    """The run that the others are compared with, prompt by prompt."""

    def score(self, label: str, bench: str, temperature: float, shape: str) -> Score | None:
        return self.scores.get((label, bench, temperature, shape))

    def difference(self, score: Score) -> Estimate | None:
        """Tokens per step less those of the run `beside`, on the same prompts and answers."""
        other = self.score(self.beside, score.bench, score.temperature, score.shape)
        if other is None or other is score or score.shape == OWN:
            return None
        return paired_difference(score.by_prompt, other.by_prompt)

    def title(self, shape: str) -> str:
        """What entries drafted under this name: the longest chain, the most common tree."""
        drafts = sorted(s.drafts for s in self.scores.values() if s.shape == shape)
        if shape == "chain":
            return max(drafts, key=lambda name: int(name.removeprefix("chain")))
        return shape if shape == OWN else max(drafts, key=drafts.count)

    def speedup(self, score: Score) -> Estimate | None:
        """Predicted from the timed rounds of that shape."""
        timing = self.timings.get((score.label, score.temperature, score.shape))
        return score.tau.divided_by(timing.break_even_tau) if timing else None


def load(store: Store, beside: str | None = None) -> Comparison:
    """Read all cells of an output folder; `beside` is the first label when it is null."""
    scores: dict[tuple[str, str, float, str], Score] = {}
    timings: dict[tuple[str, float, str], Timing] = {}
    for label in store.labels():
        for cell in store.cells(label):
            if "result" in cell:
                s = Score.of(label, cell)
                scores[label, s.bench, s.temperature, s.shape] = s
            elif cell["timing"] is not None:
                timings[label, cell["temperature"], cell["shape"]] = Timing(**cell["timing"])
    if not scores:
        raise ValueError(
            f"There is nothing to report in '{store.out}', expected measured cells; give "
            "'runs=[runs/<name>/latest, ...]' to measure some, or the out=<folder> of a comparison."
        )
    planned = json.loads((store.out / "settings.json").read_text())["shapes"]
    there = {shape for _, _, _, shape in scores}
    known = ["chain", *planned]
    shapes = [s for s in [*known, *sorted(there - {*known, OWN}), OWN] if s in there]
    benches = unique(s.bench for s in scores.values())
    benches.sort(key=lambda b: (b == "heldout", b))
    temperatures = sorted({s.temperature for s in scores.values()})
    entries = {x: store.entry(x) for x in unique(label for label, *_ in scores)}
    best = {
        label: max(
            (
                s.tau.value
                for s in scores.values()
                if (s.label, s.bench, s.temperature) == (label, benches[0], temperatures[0])
            ),
            default=0.0,
        )
        for label in entries
    }
    labels = sorted(entries, key=lambda x: (entries[x]["run"] is None, -best[x], x))
    runs = [label for label in labels if entries[label]["run"] is not None]
    if beside is not None and beside not in runs:
        raise ValueError(
            f"beside={beside} is none of the runs in '{store.out}' ({', '.join(runs)}); give one "
            "of them, or null for the one that leads."
        )
    chosen = beside or (runs or labels)[0]
    return Comparison(labels, entries, shapes, benches, temperatures, scores, timings, chosen)


def unique(items: Iterable[T]) -> list[T]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(items))
