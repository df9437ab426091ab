"""A part of a draft tree."""

import pytest
import torch

from models.tree import Tree


def tree() -> Tree:
    """0 -> 1, 2; 1 -> 3; 2 -> 4; 3 -> 5."""
    parents = [-1, 0, 0, 1, 2, 3]
    return Tree(
        tokens_N=torch.arange(10, 16),
        parents_N=torch.tensor(parents),
        depths_N=torch.tensor([0, 1, 1, 2, 2, 3]),
        draws_N=torch.ones(6),
        q_NV=torch.arange(12.0).reshape(6, 2),
        replacement=False,
        stepped_S=torch.tensor([0, 1, 2, 3]),
    )


def test_keep_renumbers_parents_and_stepped_nodes() -> None:
    kept = tree().keep(torch.tensor([0, 2, 4]))
    assert kept.tokens_N.tolist() == [10, 12, 14]
    assert kept.parents_N.tolist() == [-1, 0, 1]
    assert kept.depths_N.tolist() == [0, 1, 2]
    assert kept.q_NV is not None
    assert kept.q_NV.tolist() == [[0, 1], [4, 5], [8, 9]]
    assert not kept.replacement
    assert kept.stepped_S is not None
    assert kept.stepped_S.tolist() == [0, -1, 1, -1]


def test_keep_needs_every_parent() -> None:
    with pytest.raises(AssertionError, match="parent"):
        tree().keep(torch.tensor([0, 3]))
