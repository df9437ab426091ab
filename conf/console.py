"""The one place that writes to the terminal."""

import os

from rich.console import Console

console = Console(stderr=True)
"""Shared by every command; on stderr, so that stdout stays free for results one may pipe."""


def is_first_process() -> bool:
    """Whether this process speaks and writes for all processes of a run.

    By what torchrun, Slurm and Lightning tell the processes they start.
    """
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]) == 0
    if "LOCAL_RANK" in env:
        return int(env["LOCAL_RANK"]) == int(env.get("NODE_RANK", 0)) == 0
    return int(env.get("SLURM_PROCID", 0)) == 0


def say(text: str) -> None:
    """Print one line of progress or explanation, as it is: no rich markup, not wrapped by us."""
    if not is_first_process():
        return
    console.print(text, markup=False, highlight=False, soft_wrap=True)
