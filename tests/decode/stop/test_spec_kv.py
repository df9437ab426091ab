"""The length network: what it learns, what it chooses, and where it is kept."""

import random
from pathlib import Path

import pytest
import torch

from decode.stop.spec_kv import FILE, History, LengthNet, SpecKv, fit, save
from tests.decode.stop.told import Told


def constant(chances: list[float]) -> LengthNet:
    """A network that always says these conditional chances."""
    net = LengthNet(len(chances))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.net[2].bias.copy_(torch.tensor(chances).logit())  # type: ignore[union-attr, operator]
    return net


def chosen(tmp_path: Path, chances: list[float], round_ms: list[float]) -> int:
    save(tmp_path / FILE, constant(chances), round_ms)
    return SpecKv(run_dir=tmp_path).choose(Told())


def test_it_weighs_tokens_by_time(tmp_path: Path) -> None:
    chances = [0.8, 0.8, 0.8]  # 1.8, 2.44, 2.952 tokens
    assert chosen(tmp_path, chances, [10.0, 10.0, 10.0]) == 3  # time left out: the longest
    assert chosen(tmp_path, chances, [10.0, 13.0, 17.0]) == 2  # 0.180, 0.188, 0.174
    assert chosen(tmp_path, chances, [10.0, 15.0, 20.0]) == 1  # 0.180, 0.163, 0.148


def test_the_draft_ends_at_the_chosen_length(tmp_path: Path) -> None:
    save(tmp_path / FILE, constant([0.8, 0.8, 0.8]), [10.0, 13.0, 17.0])
    rule = SpecKv(run_dir=tmp_path)
    assert [rule.ends(Told(depth=k)) for k in range(2)] == [False, True]


def test_it_learns_what_the_inputs_say() -> None:
    """Rounds with best = 0.9 accept every draft with 0.9, those with best = 0.3 with 0.3."""
    generator = random.Random(0)
    inputs, accepted = [], []
    for _ in range(1500):
        best = generator.choice([0.3, 0.9])
        length = 0
        while length < 3 and generator.random() < best:
            length += 1
        inputs.append([best, best, 1.0, 0.5])
        accepted.append(length)
    net = fit(inputs, accepted, 3)
    with torch.no_grad():
        survival_NG = net(torch.tensor([[0.3, 0.3, 1.0, 0.5], [0.9, 0.9, 1.0, 0.5]]))
    expected_NG = torch.tensor([[0.3, 0.09, 0.027], [0.9, 0.81, 0.729]])
    assert torch.allclose(survival_NG, expected_NG, atol=0.06)


def test_history_is_a_running_share() -> None:
    history = History()
    history.verified(4, 3)
    assert history.rate == pytest.approx(0.9 * 0.5 + 0.1 * 0.75)
    history.verified(0, 0)
    assert history.rate == pytest.approx(0.525)


def test_a_missing_or_foreign_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tune=true"):
        SpecKv(run_dir=tmp_path)
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="delete it"):
        SpecKv(run_dir=tmp_path)
