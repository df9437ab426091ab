"""Whole drafts from one exit of a drafter that has several."""

from collections.abc import Sequence

from decode.stop.base import Seen, Stop
from models.drafter.base import Drafter


class Exit(Stop):
    """All drafts come from exit `exit` (0-based, first to last). No draft ends early.

    The fixed choice that a choosing rule (decode/stop/del_exit.py) is compared with.
    """

    def __init__(self, *, exit: int, exit_costs: Sequence[float]) -> None:
        require_exits("exit", exit_costs)
        if not 0 <= exit < len(exit_costs):
            raise ValueError(
                f"stop.exit={exit} was asked for, but this drafter has {len(exit_costs)} exits, "
                f"counted from 0; give 0 to {len(exit_costs) - 1}."
            )
        self.exit = exit

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return f"exit{self.exit}"

    def begins(self, drafter: Drafter, gamma: int) -> None:
        """From this exit."""
        drafter.leave_at = self.exit

    def ends(self, seen: Seen) -> bool:
        """Never before tree.gamma."""
        return False


def require_exits(rule: str, exit_costs: Sequence[float]) -> None:
    """Refuse a drafter without a choice."""
    if len(exit_costs) < 2:
        raise ValueError(
            f"stop={rule} chooses among the exits of a drafter, but this one has a single way of "
            "drafting; use a drafter with several exits (drafter=sorted_lm), or another rule."
        )
