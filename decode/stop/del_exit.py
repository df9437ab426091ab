"""Which exit drafts come from, and how many, by what was accepted (DEL, self-speculation)."""

from collections.abc import Sequence

from decode.stop.base import Seen, Stop
from decode.stop.exit import require_exits
from models.drafter.base import Drafter


class DelExit(Stop):
    """Before every round, the exit e and the length g with the most tokens for what is read:

        argmax_{e, g}  (1 + a_e + a_e^2 + ... + a_e^g) / (1 + g c_e)

    a_e is the running share of drafts from exit e that were accepted among those put to the test,
    older rounds of that exit weighing `memory` less each; c_e what a draft from e costs in target
    forwards, by default the share of the target's weights it reads (DEL's tokens per layer).
    An exit that nothing is known of yet counts as good. Every `probe`-th round goes to the others
    in turn, or an exit that was unlucky once would never be seen again.

    Deviation: DEL judges all exits after every round, by hidden states of the target that exist
    anyway, because it drafts with the target's own layers. The exits of a drafter beside the target
    would have to be computed for it, so each is judged by its own rounds here.

    The choice is made before anything of the round is drawn, from rounds that are over.
    """

    def __init__(
        self,
        *,
        exit_costs: Sequence[float],
        costs: list[float] | None = None,
        probe: int = 16,
        memory: float = 0.95,
    ) -> None:
        require_exits("del_exit", exit_costs)
        if probe < 2 or not 0.0 < memory < 1.0:
            raise ValueError(
                f"stop.probe={probe} and stop.memory={memory:g} should be 2 or more rounds and "
                "between 0 and 1, because most rounds go to the best exit and older ones count "
                "less; give others."
            )
        if costs is not None and (len(costs) != len(exit_costs) or min(costs) <= 0.0):
            raise ValueError(
                f"stop.costs={costs} should be {len(exit_costs)} numbers above 0, what a draft "
                "from each exit of this drafter costs in target forwards; give so many, or null."
            )
        self.costs = list(costs or exit_costs)
        self.probe, self.memory = probe, memory
        self.accepted = [0.0 for _ in self.costs]
        self.tested = [0.0 for _ in self.costs]
        self.exit, self.length = 0, 1
        self._rounds = self._probes = 0

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return "del_exit"

    def rate(self, exit: int) -> float:
        """a_e; one imagined success keeps it above 0, and makes it 1 where nothing is known."""
        return (self.accepted[exit] + 1.0) / (self.tested[exit] + 1.0)

    def choose(self, exits: Sequence[int], gamma: int) -> tuple[int, int]:
        """The best of these exits and its number of drafts."""
        best, found = 0.0, (exits[0], 1)
        for exit in exits:
            a, survives, tokens = self.rate(exit), 1.0, 1.0
            for length in range(1, gamma + 1):
                survives *= a
                tokens += survives
                value = tokens / (1.0 + length * self.costs[exit])
                if value > best:
                    best, found = value, (exit, length)
        return found

    def begins(self, drafter: Drafter, gamma: int) -> None:
        """Choose, and tell the drafter."""
        exits = list(range(len(self.costs)))
        self.exit, self.length = self.choose(exits, gamma)
        self._rounds += 1
        if self._rounds % self.probe == 0:
            others = [e for e in exits if e != self.exit]
            self.exit, self.length = self.choose([others[self._probes % len(others)]], gamma)
            self._probes += 1
        drafter.leave_at = self.exit

    def ends(self, seen: Seen) -> bool:
        """Behind as many drafts as were chosen."""
        return seen.depth + 1 >= self.length

    def verified(self, tested: int, accepted: int) -> None:
        e, kept = self.exit, self.memory
        self.accepted[e] = kept * self.accepted[e] + accepted
        self.tested[e] = kept * self.tested[e] + tested
