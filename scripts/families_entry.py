"""What is compared: a run, or a method that needs no training."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from decode.baselines.base import Baseline
from models.drafter.base import Drafter
from models.run import Run
from models.target import Target
from scripts.families_cells import digest


@dataclass(frozen=True)
class Entry:
    """`method` is a config node; without one the entry is the run itself. A method takes the
    target and the held-out prompts from a run as well."""

    label: str
    run: Run
    method: Any = None

    @property
    def stamp(self) -> str:
        """Changes with the drafter (or the method's settings) and the ranks that shape trees."""
        if self.method is not None:
            return digest(OmegaConf.to_yaml(self.method, sort_keys=True).encode())
        ranks = self.run.path / "rank_accuracy.json"
        weights = self.run.drafter_folder / "model.safetensors"
        return digest(weights.read_bytes(), ranks.read_bytes() if ranks.is_file() else b"")


def describe(entry: Entry, target: Target, drafter: Drafter | Baseline) -> dict[str, Any]:
    """What a reader of the table wants to know of an entry."""
    about: dict[str, Any] = {
        "label": entry.label,
        "target": target.name,
        "target_parameters": target.num_parameters,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
    }
    if isinstance(drafter, Baseline):
        return about | {"method": type(drafter).__name__, "run": None}
    facts = entry.run.facts
    epochs = _epochs(entry.run.path / "metrics.csv")
    learned = facts.get("dataset", {}).get("tokens_to_learn")
    return about | {
        "run": str(entry.run.path),
        "command": facts.get("command", []),
        "drafter": facts.get("drafter", {"class": type(drafter).__name__}),
        "max_depth": drafter.max_depth,
        "dataset": facts.get("dataset", {}),
        "train_seconds": facts.get("results", {}).get("train_seconds"),
        "steps": facts.get("results", {}).get("step"),
        "tokens_learned": None if None in (epochs, learned) else round(epochs * learned),
        "resumed": any(str(a).startswith("resume=") for a in facts.get("command", [])),
    }


def _epochs(metrics: Path) -> float | None:
    """How far training went: the last epoch that was logged, a fraction."""
    if not metrics.is_file():
        return None
    with metrics.open(newline="") as file:
        logged = [float(row["epoch"]) for row in csv.DictReader(file) if row.get("epoch")]
    return max(logged, default=None)
