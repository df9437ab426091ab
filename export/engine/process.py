"""Programs that run in an engine's environment, and that are over when we are done with them."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAST_LINES = 25
PATIENCE_S = 15.0
"""How long a program may take to end after it was asked to."""


@contextmanager
def running(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The program, in a process group of its own that is ended for sure on the way out.

    What it prints goes to `log`. `environment` is added to ours.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)


def call_driver(
    python: Path,
    script: Path,
    request: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    timeout_s: float,
) -> Any:
    """Run a script (one of `drivers/`) with another Python: JSON in, JSON out.

    Raises ValueError with the script's last lines when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="draftsmith-") as made:
        folder = Path(made)
        asked, answered, log = folder / "request.json", folder / "answer.json", folder / "log.txt"
        asked.write_text(json.dumps(request))
        # -I: nothing of this environment leaks into the other.
        command = [str(python), "-I", str(script), str(asked), str(answered)]
        with running(command, log=log, environment=environment) as process:
            try:
                code: int | None = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
        if code == 0 and answered.is_file():
            return json.loads(answered.read_text())
        over = f"was not done after {timeout_s:.0f} s" if code is None else f"ended with {code}"
        raise ValueError(
            f"The script {script.name}, run with {python}, {over}, expected an answer in JSON; its "
            f"last lines follow.\n{last_lines(log)}"
        )


def driver_file(driver: str) -> Path:
    """The script of that name."""
    return Path(__file__).parent / "drivers" / f"{driver}.py"


def last_lines(log: Path) -> str:
    """The end of what a program printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, wait, and kill what is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
