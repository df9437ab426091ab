"""Two more after a success, one less after a failure."""

import pytest

from decode.stop.heuristic import Heuristic
from tests.decode.stop.told import Told


def draft(rule: Heuristic, gamma: int) -> int:
    """How many tokens are drafted with at most gamma."""
    return next(k + 1 for k in range(gamma) if rule.ends(Told(depth=k)) or k + 1 == gamma)


def test_lengths_follow_the_outcomes() -> None:
    rule, made = Heuristic(start=3), []
    for tested, accepted in [(3, 3), (3, 2), (1, 0), (1, 0), (1, 0), (1, 0)]:
        made.append(draft(rule, 20))
        rule.verified(tested, accepted)
    made.append(draft(rule, 20))
    assert made == [3, 5, 4, 3, 2, 1, 1]


def test_what_gamma_cuts_off_is_not_counted_on() -> None:
    rule = Heuristic(start=6)
    assert draft(rule, 4) == 4
    rule.verified(1, 0)
    assert draft(rule, 4) == 3
    rule.verified(3, 3)
    assert rule.length == 5
    assert draft(rule, 4) == 4
    rule.verified(4, 4)
    assert rule.length == 6


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop\.start=0"):
        Heuristic(start=0)
