"""Programs that run beside us, and that are over when we are, however that comes about."""

import contextlib
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LAST_LINES = 25
PATIENCE_S = 15.0
"""How long a program may take to end after it was asked to."""
GUARD = f"read _; kill -TERM -$0; sleep {PATIENCE_S:.0f}; kill -KILL -$0"
"""Waits for the end of a pipe whose other end is ours alone: even SIGKILL closes it."""


@contextmanager
def running(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The program, in a process group of its own that is ended for sure on the way out, and soon
    after this process was killed.

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
            with _guarded(process.pid):
                yield process
        finally:
            _end(process)


def last_lines(log: Path) -> str:
    """The end of what a program printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


@contextmanager
def _guarded(group: int) -> Iterator[None]:
    guard = subprocess.Popen(
        ["/bin/sh", "-c", GUARD, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()
        assert guard.stdin is not None
        guard.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, wait, and kill what is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
