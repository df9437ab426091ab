"""Block verification: its law, the pitfall, and that it is never shorter than token by token."""

from itertools import product

import pytest
import torch

from decode.verifier import block
from decode.verifier.block import Block
from decode.verifier.sampling import Sampling
from decode.verifier.traversal import Traversal
from models.drafter.base import Tree
from tests.decode.enumerated import error_of, mean_accepted, numpy_tables, texts_law, verified
from tests.decode.toy import Scripted, joint, tables

V = 3


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("seed", [31, 33])
def test_it_keeps_the_law_and_is_never_shorter(gamma: int, seed: int) -> None:
    p, q = tables(seed, V, gamma), tables(seed + 1, V, gamma)
    law = texts_law(p, q, [1] * gamma, Block(), replacement=True)
    assert error_of(p, gamma + 1, law) < 1e-12
    token = texts_law(p, q, [1] * gamma, Sampling(), replacement=True)
    bound = sum(
        min(joint(p, text), joint(q, text))
        for length in range(1, gamma + 1)
        for text in product(range(V), repeat=length)
    )
    assert mean_accepted(token) - 1e-12 <= mean_accepted(law) <= bound + 1e-12
    if gamma == 1:
        assert mean_accepted(law) == pytest.approx(mean_accepted(token), abs=1e-12)


def test_the_documented_toy() -> None:
    p, q = numpy_tables(1, V, 4, 1.2), numpy_tables(2, V, 4, 1.2)
    law = texts_law(p, q, [1, 1, 1], Block(), replacement=True)
    token = texts_law(p, q, [1, 1, 1], Sampling(), replacement=True)
    assert mean_accepted(token) == pytest.approx(1.752, abs=5e-4)
    assert mean_accepted(law) == pytest.approx(1.850, abs=5e-4)
    assert error_of(p, 4, law) < 1e-12


def test_control_accepting_with_w_is_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = numpy_tables(1, V, 4, 1.2), numpy_tables(2, V, 4, 1.2)
    right = block.excess
    monkeypatch.setattr(block, "excess", lambda p_V, q_V, w: (right(p_V, q_V, w)[0], w))
    law = texts_law(p, q, [1, 1, 1], Block(), replacement=True)
    assert error_of(p, 4, law) == pytest.approx(0.058, abs=5e-4)


def test_it_is_traversal_verification_on_a_chain() -> None:
    p, q = tables(35, V, 3), tables(36, V, 3)
    ours = texts_law(p, q, [1, 1, 1], Block(), replacement=True)
    theirs = texts_law(p, q, [1, 1, 1], Traversal(), replacement=True)
    for text in ours.keys() | theirs.keys():
        assert ours[text] == pytest.approx(theirs[text], abs=1e-13)


def test_a_chain_that_was_chosen_keeps_the_law() -> None:
    p = tables(37, V, 3)
    tree = Tree(torch.tensor([0, 2, 0, 1]), torch.arange(-1, 3), torch.arange(4), torch.ones(4))
    law = {
        (*text, token): weight * last
        for text, bonus_V, weight in verified(tree, p, Block())
        for token, last in enumerate(bonus_V)
    }
    assert error_of(p, 4, law) < 1e-12


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    p = tables(38, V, 3)
    law = texts_law(p, p, [1, 1, 1], Block(), replacement=True)
    assert mean_accepted(law) == pytest.approx(3.0, abs=1e-12)


def test_at_temperature_zero_it_is_greedy() -> None:
    p = {
        text: torch.eye(V, dtype=torch.double)[row.argmax()]
        for text, row in tables(39, V, 3).items()
    }
    best: tuple[int, ...] = ()
    for _ in range(4):
        best = (*best, int(p[best[:3]].argmax()))
    for drafts in product(range(V), repeat=3):
        tree = Tree(torch.tensor([0, *drafts]), torch.arange(-1, 3), torch.arange(4), torch.ones(4))
        right = next((i for i in range(3) if drafts[i] != best[i]), 3)
        (text, bonus_V, weight), *others = verified(tree, p, Block())
        assert not others
        assert (text, weight, bonus_V[best[right]]) == (best[:right], 1.0, 1.0)


def test_a_root_alone_gives_a_token_of_p() -> None:
    p = tables(40, V, 0)
    tree = Tree(torch.tensor([0]), torch.tensor([-1]), torch.tensor([0]), torch.ones(1))
    assert list(verified(tree, p, Block())) == [((), p[()].tolist(), 1.0)]


def test_it_refuses_siblings() -> None:
    tree = Tree(
        torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 0]), torch.tensor([0, 1, 1]), torch.ones(3)
    )
    with pytest.raises(ValueError, match="verifier=traversal"):
        Block().verify(tree, lambda node: torch.ones(V) / V, Scripted([]))
