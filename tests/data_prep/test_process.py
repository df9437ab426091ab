"""A program that runs beside us is over when we are, even when nobody could end it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_prep.process import last_lines, running

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from data_prep.process import running

with running(["sh", "-c", "echo begun; sleep 1000 & sleep 1000"], log=Path(sys.argv[1]),
             environment={}) as process:
    print(process.pid, flush=True)
    time.sleep(1000)
"""


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_the_end(group: int) -> None:
    deadline = time.monotonic() + 10
    while alive(group):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["sh", "-c", "echo $WORD; sleep 1000 & sleep 1000"]
    with running(command, log=log, environment={"WORD": "hello"}) as process:
        while not log.read_text():
            time.sleep(0.01)
        assert alive(process.pid)
    assert last_lines(log) == "hello"
    wait_for_the_end(process.pid)


def test_it_ends_when_we_are_killed(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "log")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    group = int(child.stdout.readline())
    assert alive(group)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    wait_for_the_end(group)
