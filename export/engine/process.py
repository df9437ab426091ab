"""Scripts that run with the Python of an engine's environment."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.process import last_lines, running


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
