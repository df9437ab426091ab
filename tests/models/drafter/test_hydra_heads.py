"""Hydra's own maths; the contract tests cover the rest."""

from typing import Any

import torch
from torch.nn import functional as F

from models.drafter.blocks import CausalLayer
from models.drafter.hydra_heads import HydraHeads
from models.target import Target

HEAD = {"_target_": "models.head.own.OwnHead"}


def _hydra(target: Target, **changes: Any) -> HydraHeads:
    torch.manual_seed(0)
    drafter = HydraHeads(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=HEAD,
        **changes,
    )
    drafter.bind(target).init_from(target)
    for parameter in drafter.blocks.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return drafter.eval()


def test_head_k_reads_the_feature_and_the_next_k_plus_one_tokens(target: Target) -> None:
    """y_k = R z + SiLU(A z + a) with z = [f_t; E(x_{t+1}); ...; E(x_{t+1+k})], written out."""
    drafter = _hydra(target, num_heads=3)
    tokens = torch.randint(3, target.vocab_size, (1, 9))
    features = target.forward(tokens)
    t = 4
    for k, depth in enumerate(drafter.unroll(features, tokens)):
        z = torch.cat([features.final_BTd[0, t], *target.embed(tokens[0, t + 1 : t + 2 + k])])
        block = drafter.blocks[k][1]  # type: ignore[index]  # [0] is the dropout
        expected = block.residual(z) + F.silu(block.linear(z))  # type: ignore[operator,union-attr]
        torch.testing.assert_close(depth.states_BNd[0, t], expected, rtol=1e-5, atol=1e-5)
        assert depth.shift == 1 + k


def test_parameter_count_follows_the_paper(target: Target) -> None:
    """Head k: 2 ((k+2) d^2 + d) for its first block, d^2 + d for each further one."""
    drafter = _hydra(target, num_heads=4, num_layers=4)
    d = target.hidden_size
    blocks = sum(2 * ((k + 2) * d * d + d) + 3 * (d * d + d) for k in range(4))
    assert sum(p.numel() for p in drafter.blocks.parameters()) == blocks


def test_prefix_layer_in_pieces_equals_the_whole_sequence(target: Target) -> None:
    from transformers import DynamicCache

    torch.manual_seed(0)
    layer = CausalLayer(hidden_size=target.hidden_size, **target.layer_shape).eval()
    hidden = torch.randn(1, 11, target.hidden_size)
    cache = DynamicCache()
    pieces = [layer(piece, cache) for piece in hidden.split([4, 1, 3, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(hidden), rtol=1e-5, atol=1e-5)


def test_nothing_of_the_target_is_stored(target: Target) -> None:
    drafter = _hydra(target, prefix_layer=True)
    owned = {tuple(t.shape) for t in drafter.state_dict().values()}
    heads = [name for name in drafter.state_dict() if name.startswith("heads.")]
    assert len(heads) == drafter.num_depths  # the trained heads, and no embedding beside them
    assert (target.vocab_size, target.hidden_size) in owned
    assert not any("embed" in name for name in drafter.state_dict())
