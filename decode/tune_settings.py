"""The rules and numbers that a tuning tries, spelled as `python -m decode` takes them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from decode.simulate import RoundCost
from decode.stop.base import Stop
from decode.stop.confidence import Confidence
from decode.stop.del_exit import DelExit
from decode.stop.dynamic_threshold import DynamicThreshold
from decode.stop.exit import Exit
from decode.stop.heuristic import Heuristic
from decode.stop.spec_kv import SpecKv
from decode.stop.specdec_pp import SpecDecPp
from decode.stop.svip import Svip
from models.acceptance import AcceptanceHead

FIXED = "fixed gamma"
TENTHS = [n / 10 for n in range(1, 10)]


@dataclass(frozen=True)
class Setting:
    """A rule with its numbers: how to ask for it, and how to make it new for a run of rounds."""

    rule: str
    words: str
    gamma: int
    make: Callable[[], Stop | None]


def candidates(
    longest: int, head: AcceptanceHead | None, run_dir: Path, costs: Sequence[RoundCost]
) -> Iterator[Setting]:
    """Every rule with the numbers that are tried, spelled as `python -m decode` takes them."""
    for gamma in range(1, longest + 1):
        yield Setting(FIXED, f"tree.gamma={gamma}", gamma, lambda: None)

    def rule(name: str, numbers: str, make: Callable[[], Stop]) -> Setting:
        words = f"tree.gamma={longest} stop={name} {numbers}".strip()
        return Setting(name, words, longest, make)

    for t in TENTHS:
        asked = f"stop.threshold={t:g}"
        yield rule("confidence", asked, lambda t=t: Confidence(threshold=t))
        yield rule("svip", asked, lambda t=t: Svip(threshold=t))
        if head is not None:
            yield rule("specdec_pp", asked, lambda t=t: SpecDecPp(threshold=t, acceptance=head))
    for start in (2, 5):
        yield rule("heuristic", f"stop.start={start}", lambda n=start: Heuristic(start=n))
    for t in (0.2, 0.4):
        asked = f"stop.threshold={t:g}"
        yield rule("dynamic_threshold", asked, lambda t=t: DynamicThreshold(threshold=t))
    yield rule("spec_kv", "", lambda: SpecKv(run_dir=run_dir))
    if len(costs) > 1:
        # A clock can find that longer drafts took no longer.
        ratios = [max(0.001, round(cost.ratio, 3)) for cost in costs]
        for place in range(len(costs) - 1):
            for gamma in range(1, longest + 1):
                words = f"tree.gamma={gamma} stop=exit stop.exit={place}"
                yield Setting("exit", words, gamma, from_exit(place, ratios))
        asked = "stop.costs=[" + ",".join(map(str, ratios)) + "]"
        yield rule("del_exit", asked, lambda: DelExit(exit_costs=ratios, costs=ratios))


def from_exit(place: int | None, exit_costs: Sequence[float]) -> Callable[[], Stop | None]:
    """Whole drafts from one exit; None: the drafter has one way of drafting."""
    return lambda: None if place is None else Exit(exit=place, exit_costs=exit_costs)
