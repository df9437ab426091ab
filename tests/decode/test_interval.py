"""Differences of two drafters on the same prompts."""

import numpy as np
import pytest

from decode.interval import bootstrap, paired_difference


def counts(rounds: list[int]) -> dict[str, tuple[float, float]]:
    """60 tokens a prompt, made in so many rounds."""
    return {f"prompt {i}": (60.0, float(r)) for i, r in enumerate(rounds)}


def test_the_difference_is_that_of_the_two_ratios() -> None:
    these, those = counts([20, 30, 40]), counts([30, 30, 60])
    assert paired_difference(these, those).value == pytest.approx(180 / 90 - 180 / 120)
    assert paired_difference(those, these).value == pytest.approx(180 / 120 - 180 / 90)
    nothing = paired_difference(these, these)
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_what_makes_prompts_easy_drops_out() -> None:
    """Two drafters that need one round in ten less or more on prompts of very different kinds."""
    rounds = np.random.default_rng(1).integers(10, 60, size=40)
    these, those = counts(list(rounds * 10)), counts(list(rounds * 11))
    less = paired_difference(these, those)
    alone = [bootstrap(list(x.values()), lambda r: r) for x in (these, those)]
    assert alone[1].high > alone[0].low  # their intervals overlap
    assert 0.0 < less.low <= less.value <= less.high
    assert less.high - less.low < 0.2 * (alone[0].high - alone[0].low)


def test_order_does_not_matter_and_other_prompts_are_refused() -> None:
    these, those = counts([20, 30, 40]), counts([25, 35, 45])
    assert paired_difference(these, dict(reversed(those.items()))) == paired_difference(
        these, those
    )
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(these, counts([20, 30]))
