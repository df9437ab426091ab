"""The entropy bound, worked by hand."""

import math

import pytest

from decode.stop.svip import Svip
from tests.decode.stop.told import Told


def test_the_bound_is_one_minus_the_root_of_c_times_entropy() -> None:
    # H of a fair coin is ln 2: 1 - sqrt(0.25 ln 2) = 0.5837.
    coin = Told(entropy=math.log(2.0))
    assert not Svip(threshold=0.58).ends(coin)
    assert Svip(threshold=0.59).ends(coin)
    assert not Svip(threshold=0.99).ends(Told(entropy=0.0))  # a sure row is worth 1
    assert Svip(threshold=0.5, c=1.0).ends(coin)  # 1 - sqrt(ln 2) = 0.167


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stop\.c=0"):
        Svip(threshold=0.5, c=0.0)
