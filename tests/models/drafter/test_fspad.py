"""FSPAD's own maths; the contract tests cover the rest."""

import torch
from torch.nn import functional as F

from models.drafter.fspad import Fspad
from models.target import Target


def _fspad(target: Target) -> Fspad:
    torch.manual_seed(0)
    drafter = Fspad(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head={"_target_": "models.head.frozen.FrozenHead"},
    )
    drafter.bind(target)
    return drafter.eval()


def test_the_token_gates_what_is_sampled_of_the_feature(target: Target) -> None:
    """y = z + D (SiLU(G E) * U RMSNorm(z)), z = C [E; f] + c."""
    drafter = _fspad(target)
    e, f = torch.randn(2, 3, target.hidden_size)
    z = torch.cat([e, f], dim=-1) @ drafter.fc.weight.T + drafter.fc.bias
    normed = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gated = F.silu(e @ drafter.gate.weight.T) * (normed @ drafter.up.weight.T)
    expected = z + gated @ drafter.down.weight.T
    fused, residual = drafter.mix(e, f)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)


def test_one_half_predicts_and_the_other_is_fed_back(target: Target) -> None:
    """[a; a] + MLP(RMSNorm(a)) of one position: it attends to itself, so a = y + O V y."""
    drafter = _fspad(target)
    tokens_BT = torch.randint(3, target.vocab_size, (1, 9))
    features = target.forward(tokens_BT)
    first, second = drafter.unroll_to(features, tokens_BT, 2)
    attention, d = drafter.layer.self_attn, target.hidden_size
    y, _ = drafter.mix(target.embed(tokens_BT[0, 1]), features.final_BTd[0, 0])
    value = attention.v_proj(y).view(-1, attention.head_dim)
    a = y + attention.o_proj(value.repeat_interleave(attention.num_key_value_groups, 0).flatten())
    mlp = drafter.layer.mlp(drafter.layer.post_attention_layernorm(a))
    assert first.feature_BNd is not None
    torch.testing.assert_close(first.states_BNd[0, 0], a + mlp[:d], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.feature_BNd[0, 0], a + mlp[d:], rtol=1e-5, atol=1e-5)
    # The second draft reads the regressed half and nothing of the other.
    with torch.no_grad():
        drafter.layer.mlp.down_proj.weight[:d] += 1.0
        again = list(drafter.unroll_to(features, tokens_BT, 2))
        assert again[0].feature_BNd is not None
        assert not torch.allclose(again[0].states_BNd, first.states_BNd)
        torch.testing.assert_close(again[0].feature_BNd, first.feature_BNd)
        assert again[1].feature_BNd is not None
        assert second.feature_BNd is not None
        torch.testing.assert_close(again[1].feature_BNd, second.feature_BNd)


def test_parameters_beyond_eagles(target: Target) -> None:
    """3dF + d of the feature sampling, dF of the wider output."""
    d, F_, d_kv = target.hidden_size, target.config.intermediate_size, 2 * 8
    eagle = 2 * d * d + d + 2 * d * d + 2 * d * d_kv + 3 * d * F_ + d
    assert sum(p.numel() for p in _fspad(target).parameters()) == eagle + 4 * d * F_ + d
