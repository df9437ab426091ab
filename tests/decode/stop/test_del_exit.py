"""What is chosen for given shares of acceptance and costs, and that others stay known."""

import pytest

from decode.simulate import Told as Chosen
from decode.stop.del_exit import DelExit
from tests.decode.stop.told import Told


def draft(rule: DelExit, gamma: int) -> tuple[int | None, int]:
    """The exit of the next round and its number of drafts."""
    told = Chosen()
    rule.begins(told, gamma)  # type: ignore[arg-type]
    length = next(k + 1 for k in range(gamma) if rule.ends(Told(depth=k)) or k + 1 == gamma)
    return told.leave_at, length


def value(a: float, c: float, g: int) -> float:
    return sum(a**k for k in range(g + 1)) / (1 + g * c)


@pytest.mark.parametrize("costs", [[0.05, 0.2], [0.05, 0.06], [0.3, 0.9]])
def test_most_tokens_for_what_is_read(costs: list[float]) -> None:
    rule = DelExit(exit_costs=costs)
    rule.accepted, rule.tested = [39.0, 69.0], [99.0, 99.0]  # a = 0.4 and 0.7
    asked = {(e, g): value((0.4, 0.7)[e], costs[e], g) for e in (0, 1) for g in range(1, 7)}
    assert draft(rule, 6) == max(asked, key=asked.__getitem__)


def test_known_by_hand() -> None:
    # (1 + 0.4) / 1.05 = 1.333, 1.56 / 1.1 = 1.418, 1.624 / 1.15 = 1.412 for exit 0;
    # (1 + 0.7) / 1.2 = 1.417, 2.19 / 1.4 = 1.564, 2.533 / 1.6 = 1.583, 2.773 / 1.8 = 1.541.
    rule = DelExit(exit_costs=[0.05, 0.2])
    rule.accepted, rule.tested = [39.0, 69.0], [99.0, 99.0]
    assert draft(rule, 6) == (1, 3)
    assert rule.choose([0], 6) == (0, 2)


def test_what_was_measured_stands_before_what_is_read() -> None:
    rule = DelExit(exit_costs=[0.05, 0.2], costs=[0.2, 0.2])
    assert rule.costs == [0.2, 0.2]
    with pytest.raises(ValueError, match=r"stop\.costs=\[0\.2\] should be 2 numbers"):
        DelExit(exit_costs=[0.05, 0.2], costs=[0.2])
    with pytest.raises(ValueError, match=r"stop\.probe=1"):
        DelExit(exit_costs=[0.05, 0.2], probe=1)


def test_the_better_exit_is_found_and_the_other_is_tried_again() -> None:
    """Exit 0 is always refused, exit 1 always accepted, later the other way round."""
    rule, taken = DelExit(exit_costs=[0.1, 0.2], probe=8), []
    for number in range(240):
        exit, length = draft(rule, 4)
        good = exit == (1 if number < 120 else 0)
        rule.verified(*((length, length) if good else (1, 0)))
        taken.append(exit)
    # At first the other is tried every 8th round; once chances have turned it is found by that.
    assert sum(taken[40:120]) == 80 - 10
    assert sum(taken[200:]) == 5


def test_the_past_of_an_exit_fades() -> None:
    rule = DelExit(exit_costs=[0.1, 0.2], memory=0.5)
    rule.exit = 1
    rule.verified(4, 3)
    rule.verified(1, 0)
    assert (rule.accepted, rule.tested) == ([0.0, 1.5], [0.0, 3.0])
    assert rule.rate(1) == pytest.approx(2.5 / 4)
    assert rule.rate(0) == 1.0
