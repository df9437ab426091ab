"""A bar over prompts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conf.console import console


@contextmanager
def progress_bar(doing: str, total: int) -> Iterator[Callable[[int, float], None]]:
    """A bar over prompts that shows tokens per step so far; gives the function that moves it."""
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tau]:.2f} tokens/step"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, tau=1.0)
        yield lambda done, tau: progress.update(task, completed=done, tau=tau)
