"""A progress bar with tokens/s and the time left; without a terminal, a line every half minute."""

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from conf.console import console, say

QUIET_SECONDS = 30.0


class Progress:
    """`with Progress("answering", total=100, unit="prompts") as p: p.advance(8, tokens=512)`."""

    def __init__(self, what: str, *, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.tokens = 0
        self._fresh = 0
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Progress":
        self._start = self._last = time.monotonic()
        self._bar.start()
        self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, speed="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if kind is None and self._fresh:
            seconds = time.monotonic() - self._start
            say(f"{self.what}: done in {clock(seconds)}{self._speed(seconds)}")

    def restart(self) -> None:
        """The work begins now; what came before was waiting."""
        self._start = self._last = time.monotonic()
        self._bar.reset(self._task, total=self.total, completed=self.done)

    def advance(self, steps: int, *, tokens: int = 0) -> None:
        self.done = min(self.done + steps, self.total)
        self._fresh += steps
        self.tokens += tokens
        now = time.monotonic()
        speed = self._speed(now - self._start)
        self._bar.update(self._task, completed=self.done, speed=speed.lstrip(", "))
        if not console.is_terminal and now - self._last >= QUIET_SECONDS:
            self._last = now
            left = (now - self._start) * (self.total - self.done) / max(self._fresh, 1)
            say(f"{self.what}: {self.done}/{self.total} {self.unit}{speed}, {clock(left)} left")

    def _speed(self, seconds: float) -> str:
        return f", {self.tokens / max(seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour, or 4.5 s below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
