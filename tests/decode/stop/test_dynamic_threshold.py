"""The threshold against a search over all of them."""

import random

import pytest

from decode.stop.dynamic_threshold import DynamicThreshold
from tests.decode.stop.told import Told


def round_(rule: DynamicThreshold, drawn: list[float], accepted: int) -> None:
    for k, q in enumerate(drawn):
        if rule.ends(Told(depth=k, drawn=q)):
            break
    rule.verified(min(accepted + 1, len(drawn)), accepted)


def test_it_waits_for_six_pairs_with_both_outcomes() -> None:
    rule = DynamicThreshold(threshold=0.0)
    round_(rule, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 7)
    assert rule.threshold == 0.0  # no rejection yet
    rule = DynamicThreshold(threshold=0.0)
    round_(rule, [0.9, 0.2], 1)
    assert rule.threshold == 0.0  # two pairs
    round_(rule, [0.9, 0.8, 0.3], 2)
    assert rule.threshold == 0.0
    round_(rule, [0.3], 0)
    # Accepted 0.9, 0.9, 0.8; rejected 0.2, 0.3, 0.3: 0.8 parts them.
    assert rule.threshold == 0.8


def test_it_is_the_best_of_all_thresholds() -> None:
    generator = random.Random(0)
    rule, pairs = DynamicThreshold(threshold=0.0, memory=100), []
    for _ in range(200):
        rule.threshold = 0.0
        q = generator.random()
        good = generator.random() < q
        round_(rule, [q], int(good))
        pairs.append((q, good))
    pairs = pairs[-100:]

    def cost(threshold: float) -> float:
        failed = [q for q, good in pairs if not good]
        passed = [q for q, good in pairs if good]
        wasted = sum(q >= threshold for q in failed) / len(failed)
        return wasted + 3.0 * sum(q < threshold for q in passed) / len(passed)

    assert cost(rule.threshold) == pytest.approx(min(cost(q) for q, _ in pairs))
    assert rule.ends(Told(drawn=rule.threshold - 1e-9))
    assert not rule.ends(Told(drawn=rule.threshold))


def test_a_short_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop\.memory=3"):
        DynamicThreshold(memory=3)
