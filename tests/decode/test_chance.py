import torch

from decode.chance import SeededChance
from tests.decode.toy import chi_square


def test_certain_and_impossible_coins() -> None:
    chance = SeededChance(seed=0)
    assert all(chance.coin(1.0) for _ in range(1000))
    assert not any(chance.coin(0.0) for _ in range(1000))


def test_draws_follow_the_distribution_and_never_hit_zeros() -> None:
    chance = SeededChance(seed=1)
    p_V = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    counts = torch.bincount(torch.tensor([chance.draw(p_V) for _ in range(2000)]), minlength=6)
    assert counts[p_V == 0].sum() == 0
    statistic, bound = chi_square(counts[p_V > 0].tolist(), (2000 * p_V[p_V > 0]).tolist())
    assert statistic < bound


def test_a_draw_from_one_hot_is_that_token() -> None:
    chance = SeededChance(seed=2)
    for token in (0, 3, 6):
        assert chance.draw(torch.eye(7)[token]) == token


def test_a_seed_repeats_itself() -> None:
    p_V = torch.full((50,), 0.02)
    first, second = SeededChance(seed=9), SeededChance(seed=9)
    assert [first.draw(p_V) for _ in range(20)] == [second.draw(p_V) for _ in range(20)]
