"""Where a comparison of runs keeps its numbers: one JSON for every cell, made by one process.

<out>/settings.json                      what all cells share
<out>/cells/<label>/entry.json           what the run is: drafter, training, folder
<out>/cells/<label>/<cell>.json          one bench, temperature and shape; or one timing
<out>/.locks/                            held while a cell is made; released when a process dies
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = "own"
"""The shape of a method without training: its own."""
SHARED = ("limit", "max_new_tokens", "max_prompt_tokens", "seed", "samples", "dtype")


@dataclass(frozen=True)
class Store:
    """The output folder of a comparison."""

    out: Path

    def agree(self, settings: dict[str, Any]) -> None:
        """Keep the settings of the first command; refuse others, which are not comparable."""
        file = self.out / "settings.json"
        with self.waiting("settings"):
            if not file.is_file():
                write_json(file, settings)
        then = json.loads(file.read_text())
        now = json.loads(json.dumps(settings))
        other = [k for k in now if k in SHARED and then.get(k) != now[k]]
        if other:
            named = ", ".join(f"{k}: {then.get(k)} then, {now[k]} now" for k in other)
            raise ValueError(
                f"The comparison in '{self.out}' was begun with other settings ({named}), and "
                "numbers of both would not be comparable; give those, or another out=<folder>."
            )

    def file(self, label: str, cell: str) -> Path:
        return self.out / "cells" / label / f"{cell}.json"

    def read(self, label: str, cell: str, about: dict[str, Any]) -> dict[str, Any] | None:
        """A cell that is there; refuses one that was made of something else."""
        file = self.file(label, cell)
        if not file.is_file():
            return None
        found = json.loads(file.read_text())
        now = json.loads(json.dumps(about))
        other = [k for k in now if found["about"].get(k) != now[k]]
        if other:
            raise ValueError(
                f"'{file}' is there already, made with another {' and '.join(other)} (the run was "
                "trained again, its prompts changed, or another run has the same label); remove "
                f"'{file.parent}' to measure it anew, or give another out=<folder>."
            )
        return found

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether this process may make a cell: False while another one does."""
        with self._lock(name).open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Alone with what is made once for all, such as a recording."""
        with self._lock(name).open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _lock(self, name: str) -> Path:
        folder = self.out / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / re.sub(r"[^\w.-]", "-", name)

    def labels(self) -> list[str]:
        """Everything that has an entry, in the order of their names."""
        return sorted(file.parent.name for file in self.out.glob("cells/*/entry.json"))

    def entry(self, label: str) -> dict[str, Any]:
        return json.loads(self.file(label, "entry").read_text())

    def cells(self, label: str) -> list[dict[str, Any]]:
        """All of an entry's cells, timings among them."""
        files = sorted(self.file(label, "entry").parent.glob("*.json"))
        return [json.loads(f.read_text()) for f in files if f.name != "entry.json"]


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(json.dumps(content, indent=1, default=str) + "\n")
    fresh.replace(file)


def digest(*parts: bytes) -> str:
    """16 hex digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]


def label_of(run: str | Path) -> str:
    """A run's name in tables: its folder, or the one above a time stamp or `latest`."""
    path = Path(run)
    own = re.fullmatch(r"latest|\d{8}-\d{6}", path.name) is None
    return path.name if own else path.parent.name
