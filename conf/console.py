"""The one place that writes to the terminal."""

from rich.console import Console

console = Console(stderr=True)
"""Shared by every command; on stderr, so that stdout stays free for results one may pipe."""


def say(text: str) -> None:
    """Print one line of progress or explanation, as it is: no rich markup, not wrapped by us."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
