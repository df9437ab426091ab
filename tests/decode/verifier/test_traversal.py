"""Traversal verification: its law on sampled and on chosen trees, and what it accepts."""

import pytest
import torch

from decode.verifier import traversal
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from decode.verifier.traversal import Traversal
from models.drafter.base import Tree
from tests.decode.enumerated import error_of, mean_accepted, numpy_tables, texts_law, verified
from tests.decode.toy import Scripted, tables

V = 3


@pytest.mark.parametrize("widths", [[1], [2], [3], [3, 1], [1, 2], [1, 2, 1]])
@pytest.mark.parametrize("replacement", [False, True])
def test_it_keeps_the_law(widths: list[int], replacement: bool) -> None:
    p, q = tables(41, V, len(widths)), tables(42, V, len(widths))
    law = texts_law(p, q, widths, Traversal(), replacement=replacement)
    assert error_of(p, len(widths) + 1, law) < 1e-12


def test_the_documented_toy() -> None:
    p, q = numpy_tables(3, V, 3, 1.3), numpy_tables(4, V, 3, 1.3)
    ours = texts_law(p, q, [2, 2], Traversal(), replacement=False)
    theirs = texts_law(p, q, [2, 2], Sampling(), replacement=False)
    assert mean_accepted(ours) == pytest.approx(0.778, abs=5e-4)
    assert mean_accepted(theirs) == pytest.approx(0.728, abs=5e-4)
    assert error_of(p, 3, ours) < 1e-12
    assert error_of(p, 3, theirs) < 1e-12


def test_control_keeping_the_weight_of_the_parent_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = numpy_tables(3, V, 3, 1.3), numpy_tables(4, V, 3, 1.3)
    right = traversal.excess
    monkeypatch.setattr(traversal, "excess", lambda p_V, q_V, a: (right(p_V, q_V, a)[0], a))
    law = texts_law(p, q, [2, 2], Traversal(), replacement=False)
    assert error_of(p, 3, law) > 1e-3


def test_on_one_level_it_is_recursive_rejection() -> None:
    p, q = tables(43, 4, 1), tables(44, 4, 1)
    for replacement in (False, True):
        ours = texts_law(p, q, [3], Traversal(), replacement=replacement)
        theirs = texts_law(p, q, [3], Sampling(), replacement=replacement)
        for text in ours.keys() | theirs.keys():
            assert ours[text] == pytest.approx(theirs[text], abs=1e-12)


def chosen_tree() -> Tree:
    return Tree(
        torch.tensor([0, 2, 0, 1, 0, 2]),
        torch.tensor([-1, 0, 0, 1, 1, 2]),
        torch.tensor([0, 1, 1, 2, 2, 2]),
        torch.ones(6),
    )


def test_a_tree_that_was_chosen_keeps_the_law() -> None:
    p = tables(45, V, 2)
    law = {
        (*text, token): weight * last
        for text, bonus_V, weight in verified(chosen_tree(), p, Traversal())
        for token, last in enumerate(bonus_V)
    }
    assert error_of(p, 3, law) < 1e-12


def test_at_temperature_zero_it_is_greedy() -> None:
    texts = [(), (2,), (0,), (2, 1), (2, 0), (0, 2)]
    for seed in range(50, 60):
        p = {
            text: torch.eye(V, dtype=torch.double)[row.argmax()]
            for text, row in tables(seed, V, 2).items()
        }
        ours = list(verified(chosen_tree(), p, Traversal()))
        theirs = Greedy().verify(chosen_tree(), lambda node, p=p: p[texts[node]], Scripted([]))
        assert len(ours) == 1
        text, bonus_V, weight = ours[0]
        assert (text, weight) == (texts[theirs.path[-1]], 1.0)
        assert bonus_V[theirs.token] == 1.0
