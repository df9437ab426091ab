"""Calibration errors by hand, and numbers that undo a distortion that is known."""

from pathlib import Path

import numpy as np
import pytest

from decode.calibration import (
    PLAIN,
    Judgements,
    calibrate,
    fit_chances,
    reliability,
    reliability_plot,
    survival_reliability,
    token_reliability,
)
from decode.trace import Trace, Walked
from models.acceptance import AcceptanceHead


def drawn(
    count: int, depths: int, sharpness: list[float], seed: int = 0, surer: float = 0.0
) -> Judgements:
    """Chances that are true; logits raised by `surer`, then times each depth's `sharpness`."""
    rng = np.random.default_rng(seed)
    true_IK = rng.normal(1.0, 1.2, size=(count, depths))
    passed_IK = rng.random((count, depths)) < 1.0 / (1.0 + np.exp(-true_IK))
    accepted_I = np.where(passed_IK.all(1), depths, passed_IK.argmin(1))
    tested_I = np.minimum(accepted_I + 1, depths)
    chance_IK = 1.0 / (1.0 + np.exp(-true_IK))
    logits_IK = (true_IK + surer) * np.array(sharpness)
    return Judgements(logits_IK, chance_IK, tested_I, accepted_I)


def test_the_error_by_hand() -> None:
    chance = np.array([0.05, 0.05, 0.95, 0.95])
    made = reliability(chance, np.array([0.0, 1.0, 1.0, 1.0]))
    assert made.truth == [0.5, 1.0]
    assert made.weight == [0.5, 0.5]
    assert made.error == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    assert reliability(np.array([1.0]), np.array([1.0])).error == 0.0


def test_only_drafts_with_a_known_end_count() -> None:
    """Accepted 2 of 2 because the text ended: of depth 2 nothing is known."""
    truth = np.array([[1.0, 1.0, 9.0], [1.0, 0.5, 9.0]])  # 9: never tested
    j = Judgements(np.zeros((2, 3)), truth, np.array([2, 2]), np.array([2, 1]))
    survived, known = j.survived(2)
    assert known.tolist() == [False, True]
    assert survived.tolist() == [False, False]
    made = token_reliability(j, PLAIN)
    assert made.chance == [0.5]
    assert made.truth == [0.875]  # of four tests
    # Survival 1/2, 1/4, 1/8 of six claims, one of them unknown.
    assert sum(survival_reliability(j, PLAIN).weight) == pytest.approx(1.0)


@pytest.mark.parametrize("surer", [0.0, 0.7])
def test_a_known_distortion_is_undone(surer: float) -> None:
    """Logits too sharp or too flat, and all of them too high: T_k divides, b_k takes off."""
    j = drawn(20_000, 3, [3.0, 0.5, 1.0], surer=surer)
    fit = fit_chances(j)
    assert fit.scale == pytest.approx([3.0, 0.5, 1.0], rel=0.12)
    assert fit.shift == pytest.approx([-surer] * 3, abs=0.2)
    fresh = drawn(20_000, 3, [3.0, 0.5, 1.0], seed=1, surer=surer)
    assert token_reliability(fresh, PLAIN).error > 0.06
    assert token_reliability(fresh, fit).error < 0.015
    assert survival_reliability(fresh, fit).error < 0.015
    # The product over a chain is the share of chains that survive.
    product = fresh.chances(fit).cumprod(axis=1).mean(axis=0)
    for k in range(3):
        assert product[k] == pytest.approx(fresh.survived(k)[0].mean(), abs=0.012)


def traced(prompts: int, lag: int) -> Trace:
    made = Trace(gamma=3 + lag, temperature=1.0, lag=lag)
    for number in range(prompts):
        j = drawn(400, 3, [2.0, 2.0, 2.0], seed=number)
        signals = np.zeros((400, 3 + lag, 5))
        signals[:, lag:, 3] = j.logits_IK
        signals[:, :3, 4] = j.truth_IK
        made.walked.append(
            Walked(
                prompt_id=str(number),
                length=401,
                starts_I=np.arange(1, 401),
                tested_I=j.tested_I,
                accepted_I=j.accepted_I,
                ends_I=np.zeros(400, dtype=bool),
                signals_IKS=signals,
            )
        )
    return made


@pytest.mark.parametrize("reads", ["drawn", "candidate"])
def test_a_head_is_calibrated_on_some_prompts_and_measured_on_others(
    reads: str, tmp_path: Path
) -> None:
    head = AcceptanceHead(state_size=4, embedding_size=4, reads=reads)  # type: ignore[arg-type]
    found = calibrate(head, traced(20, head.lag))
    assert head.scale == pytest.approx([2.0, 2.0, 2.0], rel=0.25)
    assert found.token_before.error > 2 * found.token_after.error
    assert head.calibration == found.numbers()
    assert (found.prompts_fitted, found.prompts_measured) == (10, 10)
    assert f"{found.token_after.error:.2%}" in found.sentence()
    # Behind the row of draft k stands draft k, or the one before.
    first = 1.0 / (1.0 + np.exp(-1.0 / head.scale[0] - head.shift[0]))
    assert head.chance(head.lag, 1.0) == pytest.approx(first)
    assert head.lag == 0 or head.chance(0, -9.0) == 1.0
    reliability_plot(found, tmp_path / "r.png", caption="toy")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_one_prompt_is_too_few() -> None:
    head = AcceptanceHead(state_size=4, embedding_size=4, reads="drawn")
    with pytest.raises(ValueError, match="expected 2 or more"):
        calibrate(head, traced(1, 0))
