"""How long a server rests after failures."""

import pytest

from data_prep.server.pool import rest_seconds


@pytest.mark.parametrize(
    ("failures", "longest"), [(0, 0.5), (1, 1.0), (3, 4.0), (6, 30.0), (999, 30.0)]
)
def test_rests_double_up_to_half_a_minute_with_jitter(failures: int, longest: float) -> None:
    rests = [rest_seconds(failures) for _ in range(400)]
    assert longest / 2 <= min(rests) < 0.55 * longest
    assert 0.95 * longest < max(rests) <= longest
