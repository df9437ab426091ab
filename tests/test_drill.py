"""A short drill; the long one is by hand (tests/drill.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    """Eight random disturbances over all stages, then a rank and a server that die."""
    command = [sys.executable, "-m", "tests.drill", f"folder={tmp_path / 'drill'}"]
    done = subprocess.run(
        [*command, "kills=8", "seed=1", "ranks=1", "servers=1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)  # noqa: T201  (shown with -s)
    survived = {k: int(n) for n, k in re.findall(r"(\d+) x ([\w ]+)", done.stdout)}
    assert survived.pop("a rank that dies") == 1
    assert survived.pop("a dead server") == 1
    assert sum(survived.values()) >= 8
