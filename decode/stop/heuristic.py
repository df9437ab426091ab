"""Drafts get longer after a success and shorter after a failure (transformers' `heuristic`)."""

from decode.stop.base import Seen, Stop


class Heuristic(Stop):
    """The next draft is `up` longer when all of this one was accepted, else `down` shorter.

    Never shorter than one draft; tree.gamma limits it. It begins with `start` drafts, and the
    length is carried on from prompt to prompt.
    """

    def __init__(self, *, start: int = 5, up: int = 2, down: int = 1) -> None:
        if min(start, up, down) < 1:
            raise ValueError(
                f"stop.start={start}, stop.up={up} and stop.down={down} should be 1 or more, "
                "because they count drafts; give others, or stop=null for whole drafts."
            )
        self.start, self.up, self.down = start, up, down
        self.length = start
        self._drafted = 0

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return f"heuristic{self.start}"

    def ends(self, seen: Seen) -> bool:
        """Behind as many drafts as the last outcome asks for."""
        self._drafted = seen.depth + 1
        return self._drafted >= self.length

    def verified(self, tested: int, accepted: int) -> None:
        if accepted == self._drafted:
            # What tree.gamma cut off is not counted on.
            self.length = self._drafted + self.up
        else:
            self.length = max(1, min(self.length, self._drafted) - self.down)
