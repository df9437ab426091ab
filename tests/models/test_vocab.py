"""Reduced draft vocabularies."""

import pytest
import torch

from models.vocab import choose_vocab, count_tokens


def test_counts_only_tokens_to_learn() -> None:
    tokens = torch.tensor([[5, 1, 1, 2], [2, 2, 5, 0]])
    learn = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]])
    assert count_tokens(tokens, learn, 6).tolist() == [0, 2, 2, 0, 0, 0]


def test_most_frequent_ids_with_eos_forced_in() -> None:
    counts = torch.tensor([1, 50, 0, 30, 19, 0])
    ids, coverage = choose_vocab(counts, 3, required=(5,))
    assert ids.tolist() == [1, 3, 5]
    assert coverage == pytest.approx(0.80)


def test_ties_go_to_the_lower_id() -> None:
    ids, _ = choose_vocab(torch.tensor([7, 7, 7, 7]), 2)
    assert ids.tolist() == [0, 1]


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="draft vocabulary of 9 was asked for"):
        choose_vocab(torch.ones(4), 9)
