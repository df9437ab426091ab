import random

import pytest
import torch
from torch import LongTensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from decode.baselines.prompt_lookup import PromptLookup, Text
from models.target import Features

NOTHING = Features(torch.empty(1, 0, 0))


def drafted(lookup: PromptLookup, text: list[int]) -> list[int]:
    state = lookup.start(NOTHING, torch.tensor([text]))
    tree = lookup.propose(state, torch.tensor([text[-1]]))
    assert tree.tokens_N[0] == text[-1]
    assert tree.parents_N.tolist() == list(range(-1, len(tree) - 1))
    assert tree.depths_N.tolist() == list(range(len(tree)))
    return tree.tokens_N[1:].tolist()


def test_by_hand() -> None:
    lookup = PromptLookup(gamma=3, max_ngram=2, min_ngram=1)
    # 1 2 stood at the start and was followed by 3 4 5; later by 7.
    assert drafted(lookup, [1, 2, 3, 4, 5, 1, 2, 7, 1, 2]) == [3, 4, 5]
    # No pair matches, one token does: the first 2 was followed by 3.
    assert drafted(lookup, [1, 2, 3, 4, 9, 2]) == [3, 4, 9]
    # The text ends before gamma tokens were found.
    assert drafted(lookup, [6, 6]) == [6]
    assert drafted(lookup, [1, 2, 3]) == []
    assert drafted(lookup, [1]) == []
    # A match of two is asked for and there is none.
    assert drafted(PromptLookup(gamma=3, max_ngram=3, min_ngram=2), [1, 2, 3, 4, 9, 2]) == []


@pytest.mark.parametrize("max_ngram", [1, 2, 3])
def test_like_transformers(max_ngram: int) -> None:
    theirs = PromptLookupCandidateGenerator(
        num_output_tokens=4, max_matching_ngram_size=max_ngram, max_length=1000
    )
    ours = PromptLookup(gamma=4, max_ngram=max_ngram)
    choose = random.Random(max_ngram)
    found = 0
    for _ in range(200):
        text = [choose.randrange(6) for _ in range(choose.randrange(2, 40))]
        expected = theirs.get_candidates(LongTensor([text]))[0][0, len(text) :].tolist()
        assert drafted(ours, text) == expected, text
        found += bool(expected)
    assert found > 100


def test_a_text_read_in_parts_is_the_same_text() -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1]
    whole = PromptLookup()
    parts = whole.start(NOTHING, torch.tensor([text[:4]]))
    for token in text[4:]:
        parts = whole.extend(parts, NOTHING, torch.tensor([[token]]))
    once = whole.start(NOTHING, torch.tensor([text]))
    assert isinstance(once, Text)
    assert parts.continuation(5) == once.continuation(5) == [5, 9, 2, 6, 5]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="min_ngram=4 and max_ngram=3"):
        PromptLookup(min_ngram=4)
    with pytest.raises(ValueError, match="gamma=0"):
        PromptLookup(gamma=0)
