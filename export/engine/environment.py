"""A Python environment of its own for one engine, made on demand and kept in the user's cache.

Engines pin versions of torch and transformers that exclude each other's and ours. Each one lives in
`<cache>/engines/<name>-<version>`, made with this machine's own pip settings. A folder is whole
when it holds a stamp with the pins it was made from; one without it, or with other pins, is made
anew. It is built where it stays, because an environment cannot be moved; a lock keeps two processes
from building the same one.
"""

import fcntl
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from conf.console import say
from models.packaged import cache_dir

STAMP = ".installed"
GIGABYTE = 1e9


@dataclass(frozen=True)
class Pip:
    """One call of `pip install`.

    `deps=False` leaves dependencies out. `requirements_of` adds what that (installed) distribution
    asks for, except the distributions named in `without`: engines pin audio and video libraries
    that serving text does not need.
    """

    packages: tuple[str, ...] = ()
    deps: bool = True
    requirements_of: str | None = None
    without: tuple[str, ...] = ()


class Environment:
    """What is installed, and where. Sizes and times are those seen once, to tell the user."""

    name: ClassVar[str]
    version: ClassVar[str]
    steps: ClassVar[tuple[Pip, ...]]
    gigabytes: ClassVar[float]
    minutes: ClassVar[float]

    @property
    def folder(self) -> Path:
        """Where the environment stands or will stand."""
        return cache_dir() / "engines" / f"{self.name}-{self.version}"

    @property
    def python(self) -> Path:
        """The interpreter that drivers run with."""
        return self.folder / "bin" / "python"

    def is_installed(self) -> bool:
        """Whether the folder is whole and made from these pins."""
        stamp = self.folder / STAMP
        return stamp.is_file() and json.loads(stamp.read_text()) == self._pins()

    def install(self) -> Path:
        """Make the environment unless it is there; its folder."""
        if self.is_installed():
            return self.folder
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder.parent / f".{self.folder.name}.lock"):
            if not self.is_installed():  # another process may have made it meanwhile
                self._build()
        return self.folder

    def _build(self) -> None:
        free = shutil.disk_usage(self.folder.parent).free / GIGABYTE
        if free < 2 * self.gigabytes:
            raise ValueError(
                f"Installing {self.name} {self.version} takes {self.gigabytes:g} GB and about as "
                f"much while it is unpacked, and '{self.folder.parent}' has {free:.1f} GB free; "
                "make room, or name another folder with DRAFTSMITH_CACHE=<folder>."
            )
        say(
            f"Installing {self.name} {self.version} in an environment of its own, {self.folder}: "
            f"{self.gigabytes:g} GB, about {self.minutes:g} minutes, once."
        )
        begin = time.perf_counter()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._call([sys.executable, "-m", "venv", str(self.folder)])
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        for step in self.steps:
            wanted = [*step.packages, *self._requirements(step)]
            self._call([*pip, *([] if step.deps else ["--no-deps"]), *wanted])
        (self.folder / STAMP).write_text(json.dumps(self._pins()))
        say(f"{self.name} {self.version} is ready ({time.perf_counter() - begin:.0f} s).")

    def _requirements(self, step: Pip) -> list[str]:
        if step.requirements_of is None:
            return []
        show = (
            "import importlib.metadata, json, sys;"
            "print(json.dumps(importlib.metadata.requires(sys.argv[1])))"
        )
        printed = self._call([str(self.python), "-I", "-c", show, step.requirements_of])
        return [
            wanted
            for wanted in json.loads(printed) or []
            if "extra ==" not in wanted
            and re.split(r"[^\w.-]", wanted, maxsplit=1)[0].lower() not in step.without
        ]

    def _call(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise ValueError(
                f"{self.name} {self.version} could not be installed: `{' '.join(command)}` ended "
                f"with {done.returncode}; its last lines follow. Check that this machine's pip "
                f"reaches its package index, then ask again: an unfinished folder is made anew.\n"
                f"{lines}"
            )
        return done.stdout

    def _pins(self) -> list[dict[str, object]]:
        return json.loads(json.dumps([asdict(step) for step in self.steps]))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Wait until no other process holds the lock. It is let go even when we are killed."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
