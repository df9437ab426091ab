"""Medusa's own maths; the contract tests cover the rest."""

import torch
from torch.nn import functional as F

from models.drafter.medusa import Medusa
from models.target import Target

HEAD = {"_target_": "models.head.own.OwnHead"}


def _medusa(target: Target, **changes: int) -> Medusa:
    drafter = Medusa(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, head=HEAD, **changes
    )
    drafter.bind(target).init_from(target)
    return drafter


def test_starts_as_the_target_up_to_the_block_bias(target: Target) -> None:
    """A is zero and U = W, so logits_k = W (f + SiLU(a_k)): every head first repeats p_t."""
    drafter = _medusa(target)
    features = target.forward(torch.randint(3, target.vocab_size, (1, 7)))
    for depth, block in zip(
        drafter.unroll(features, torch.zeros(1, 7, dtype=torch.long)), drafter.blocks, strict=True
    ):
        bias = block[0].linear.bias  # type: ignore[index,union-attr]
        expected = target.project(features.final_BTd + F.silu(bias))
        torch.testing.assert_close(depth.head(depth.states_BNd), expected)


def test_head_k_is_taught_by_the_distribution_k_plus_one_ahead(target: Target) -> None:
    drafter = _medusa(target, num_heads=3)
    features = target.forward(torch.randint(3, target.vocab_size, (1, 7)))
    depths = list(drafter.unroll(features, torch.zeros(1, 7, dtype=torch.long)))
    assert [d.shift for d in depths] == [1, 2, 3]


def test_repeated_blocks_are_separate_modules(target: Target) -> None:
    """The released code repeats one object, which ties the weights of all layers."""
    drafter = _medusa(target, num_layers=3)
    layers = list(drafter.blocks[0])  # type: ignore[call-overload]
    assert len({id(layer) for layer in layers}) == 3
    d = target.hidden_size
    counted = sum(p.numel() for p in drafter.blocks.parameters())
    assert counted == drafter.num_depths * 3 * (d * d + d)


def test_reduced_vocabulary_takes_the_rows_of_the_target(target: Target) -> None:
    drafter = Medusa(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=4,
        head=HEAD,
    )
    drafter.set_vocab(torch.tensor([9, 3, 200, 50]))
    drafter.bind(target).init_from(target)
    weight = drafter.head(0).linear.weight  # type: ignore[union-attr]
    torch.testing.assert_close(weight, target.head_weight_Vd[[3, 9, 50, 200]])
    assert drafter.to_target_ids(torch.tensor([0, 3])).tolist() == [3, 200]
    q = drafter.full_distribution(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    assert q.shape == (1, target.vocab_size)
    torch.testing.assert_close(q[0, [3, 9, 50, 200]], torch.tensor([0.1, 0.2, 0.3, 0.4]))
