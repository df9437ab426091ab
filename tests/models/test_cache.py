"""The growing cache against transformers' own."""

import torch
from transformers import DynamicCache

from models.cache import GrowingCache, GrowingLayer
from models.target import Target


def _run(target: Target, cache: GrowingCache | DynamicCache, *pieces: torch.Tensor) -> torch.Tensor:
    return torch.cat([target.forward(p, cache=cache).final_BTd for p in pieces], dim=1)


def test_equals_the_dynamic_cache_past_its_first_buffer(target: Target) -> None:
    tokens = torch.randint(3, target.vocab_size, (2, 300))
    pieces = (tokens[:, :200], *tokens[:, 200:].split(1, dim=1))
    ours, theirs = _run(target, GrowingCache(), *pieces), _run(target, DynamicCache(), *pieces)
    torch.testing.assert_close(ours, theirs)


def test_shorten_forgets_and_allows_to_continue(target: Target) -> None:
    tokens = torch.randint(3, target.vocab_size, (1, 20))
    wrong = torch.randint(3, target.vocab_size, (1, 5))
    cache = GrowingCache()
    _run(target, cache, tokens[:, :12], wrong)
    cache.shorten(12)
    assert cache.get_seq_length() == 12
    tail = _run(target, cache, tokens[:, 12:])
    whole = target.forward(tokens).final_BTd[:, 12:]
    torch.testing.assert_close(tail, whole, rtol=1e-4, atol=1e-4)


def test_keep_compacts_a_verified_path(target: Target) -> None:
    """Rows 4, 6 and 7 of a cache of 8 are kept behind the first 3: their keys move, unchanged."""
    cache = GrowingCache()
    _run(target, cache, torch.randint(3, target.vocab_size, (1, 8)))
    layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
    assert len(layers) == target.num_layers
    before = [layer.keys.clone() for layer in layers if layer.keys is not None]
    cache.keep(3, torch.tensor([4, 6, 7]))
    for layer, keys in zip(layers, before, strict=True):
        assert layer.keys is not None
        torch.testing.assert_close(layer.keys, keys[:, :, [0, 1, 2, 4, 6, 7]])


def test_select_rows(target: Target) -> None:
    tokens = torch.randint(3, target.vocab_size, (3, 9))
    cache = GrowingCache()
    _run(target, cache, tokens[:, :6])
    cache.select_rows(torch.tensor([0, 2]))
    tail = _run(target, cache, tokens[[0, 2], 6:])
    whole = target.forward(tokens[[0, 2]]).final_BTd[:, 6:]
    torch.testing.assert_close(tail, whole, rtol=1e-4, atol=1e-4)
