"""K-SEQ: its rho, its law, and what it accepts."""

import pytest
import torch

from decode.verifier import spectr
from decode.verifier.sampling import Sampling
from decode.verifier.spectr import SpecTr, best_rho
from models.drafter.base import Tree
from tests.decode.enumerated import (
    distributions,
    error_of,
    grown,
    mean_accepted,
    texts_law,
    verified,
)
from tests.decode.toy import Scripted, outcomes, tables

V = 3


@pytest.mark.parametrize("widths", [[1], [2], [3], [1, 3], [2, 1], [1, 1, 2]])
def test_it_keeps_the_law(widths: list[int]) -> None:
    p, q = tables(21, V, len(widths)), tables(22, V, len(widths))
    law = texts_law(p, q, widths, SpecTr(), replacement=True)
    assert error_of(p, len(widths) + 1, law) < 1e-12


@pytest.mark.parametrize("factor", [1.2, 1.5])
def test_every_larger_rho_keeps_the_law_and_a_smaller_one_does_not(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = tables(23, 4, 1), tables(24, 4, 1)
    root = best_rho(p[()], q[()], 2)
    assert 1.05 < root < 1.95
    monkeypatch.setattr(spectr, "best_rho", lambda *_: root * factor)
    larger = texts_law(p, q, [2], SpecTr(), replacement=True)
    assert error_of(p, 2, larger) < 1e-12
    monkeypatch.setattr(spectr, "best_rho", lambda *_: root)
    best = texts_law(p, q, [2], SpecTr(), replacement=True)
    assert mean_accepted(best) > mean_accepted(larger) + 1e-3
    monkeypatch.setattr(spectr, "best_rho", lambda *_: 1.0)
    assert error_of(p, 2, texts_law(p, q, [2], SpecTr(), replacement=True)) > 1e-3


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rho_solves_its_equation(count: int) -> None:
    """On 49,152 ids in fp32, where ids are left out of the bisection."""
    torch.manual_seed(count)
    p_V, q_V = (torch.randn(49152) * 3).softmax(-1), (torch.randn(49152) * 3).softmax(-1)
    rho = best_rho(p_V, q_V, count)
    beta = float(torch.minimum(p_V.double() / rho, q_V.double()).sum())
    assert 1.0 - (1.0 - beta) ** count == pytest.approx(rho * beta, abs=1e-6)


def test_rho_of_equal_and_of_disjoint_laws() -> None:
    p_V, q_V = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    # p = q: beta = 1 / rho (rho >= 1), and 1 - (1 - 1 / rho)^k = 1 has the root 1.
    assert best_rho(p_V, p_V, 3) == pytest.approx(1.0, abs=1e-4)
    assert 1.0 <= best_rho(p_V, q_V, 3) <= 3.0
    q = {(): q_V.double()} | {(x,): q_V.double() for x in range(4)}
    p = {(): p_V.double()} | {(x,): p_V.double() for x in range(4)}
    assert error_of(p, 2, texts_law(p, q, [3], SpecTr(), replacement=True)) < 1e-12
    always = texts_law(p, p, [3], SpecTr(), replacement=True)
    assert mean_accepted(always) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("pair", "vocab", "count", "accepted"), [(0, 5, 2, 0.790), (1, 5, 3, 0.603)]
)
def test_acceptance_of_the_documented_toys(
    pair: int, vocab: int, count: int, accepted: float
) -> None:
    p_V, q_V = distributions([(5, 2), (5, 3)])[pair]
    p = {(): p_V} | {(x,): p_V for x in range(vocab)}
    law = texts_law(p, {(): q_V}, [count], SpecTr(), replacement=True)
    assert mean_accepted(law) == pytest.approx(accepted, abs=5e-4)
    assert error_of(p, 2, law) < 1e-12


def test_one_child_is_the_token_level_rule() -> None:
    p, q = tables(25, V, 2), tables(26, V, 2)
    ours = texts_law(p, q, [1, 1], SpecTr(), replacement=True)
    theirs = texts_law(p, q, [1, 1], Sampling(), replacement=True)
    assert ours.keys() == theirs.keys()
    assert all(ours[text] == pytest.approx(theirs[text], abs=1e-12) for text in ours)


def test_a_token_drawn_again_is_tried_again_and_goes_on_at_its_first_node() -> None:
    """Two draws of id 0 with p(0) / (rho q(0)) < 1: the second coin may accept what the first did
    not, and the path goes through the first node, which has the children."""
    p, q = tables(27, V, 2), tables(28, V, 2)
    again = next(
        tree
        for tree, _ in outcomes(
            lambda chance: grown(q, chance, [2, 1], replacement=True, label=None)
        )
        if tree.tokens_N[1] == tree.tokens_N[2]
        and float(p[()][tree.tokens_N[1]] / q[()][tree.tokens_N[1]]) < 1.0
    )
    assert again.parents_N.tolist() == [-1, 0, 0, 1]
    first = int(again.tokens_N[1])
    a = float(p[()][first] / (best_rho(p[()], q[()], 2) * q[()][first]))
    kept = sum(w for text, _, w in verified(again, p, SpecTr()) if len(text) > 0)
    assert kept == pytest.approx(1.0 - (1.0 - a) ** 2)


def test_at_temperature_zero_it_is_greedy() -> None:
    p = {
        text: torch.eye(V, dtype=torch.double)[row.argmax()]
        for text, row in tables(29, V, 2).items()
    }
    best = int(p[()].argmax())
    for drafted in range(V):
        tree = Tree(
            torch.tensor([0, drafted]), torch.tensor([-1, 0]), torch.tensor([0, 1]), torch.ones(2)
        )
        (text, bonus_V, weight), *others = verified(tree, p, SpecTr())
        assert not others
        assert weight == 1.0
        assert text == ((best,) if drafted == best else ())
        expected = best if drafted != best else int(p[(best,)].argmax())
        assert bonus_V[expected] == 1.0


def test_it_refuses_siblings_that_are_not_independent() -> None:
    p, q = tables(21, V, 1), tables(22, V, 1)
    with pytest.raises(ValueError, match=r"tree\.replacement=true"):
        texts_law(p, q, [2], SpecTr(), replacement=False)
    chosen = Tree(
        torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 0]), torch.tensor([0, 1, 1]), torch.ones(3)
    )
    with pytest.raises(ValueError, match="chosen, not drawn"):
        SpecTr().verify(chosen, lambda node: p[()], Scripted([]))
