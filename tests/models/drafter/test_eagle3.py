"""EAGLE-3's own maths; the contract tests cover the rest.

Shape legend: T positions, H heads, c head size, d hidden size.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.drafter.eagle3 import Eagle3
from models.target import Target
from tests.models.test_contract import stir

OWN = {"_target_": "models.head.own.OwnHead"}


def _eagle3(target: Target, **settings: Any) -> Eagle3:
    torch.manual_seed(0)
    drafter = Eagle3(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=OWN,
        **settings,
    )
    drafter.bind(target).init_from(target)
    stir(drafter)
    return drafter.eval()


def _by_hand(drafter: Eagle3, target: Target, tokens_T: Tensor, steps: int) -> list[Tensor]:
    """The training-time test written out: per step, per position, one softmax over a list of keys.

    Step k at t reads E(x_{t+k+1}) and the output of step k-1 at the same t, stands at rotary
    position t + k, and sees step-0 keys s <= t and its own keys of steps 1..k.
    """
    T = len(tokens_T) - steps
    layer, attention = drafter.layer, drafter.layer.self_attn
    features = target.forward(tokens_T[None], layers=drafter.feature_layers)
    u = torch.cat([features.layers[i][0, :T] for i in drafter.feature_layers], dim=-1)
    g = u @ drafter.fc.weight.T
    cache: list[tuple[Tensor, Tensor]] = []
    outputs = []
    for k in range(steps):
        embedded = target.embed(tokens_T[k + 1 : k + 1 + T])
        c = torch.cat([drafter.input_layernorm(embedded), drafter.hidden_norm(g)], dim=-1)
        heads = (1, T, -1, attention.head_dim)
        q, key, value = (
            proj(c).view(heads).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = layer.rotary(c[None], torch.arange(T)[None] + k)
        q, key = apply_rotary_pos_emb(q, key, cos, sin)
        repeat = attention.num_key_value_groups
        cache.append((key[0].repeat_interleave(repeat, 0), value[0].repeat_interleave(repeat, 0)))
        rows = []
        for t in range(T):
            keys_HSc = torch.cat(
                [cache[0][0][:, : t + 1]] + [j[0][:, t : t + 1] for j in cache[1:]], 1
            )
            values_HSc = torch.cat(
                [cache[0][1][:, : t + 1]] + [j[1][:, t : t + 1] for j in cache[1:]], 1
            )
            scores_HS = (q[0, :, t, None] * keys_HSc).sum(-1) / attention.head_dim**0.5
            rows.append((scores_HS.softmax(-1)[..., None] * values_HSc).sum(1).flatten())
        a = g + attention.o_proj(torch.stack(rows))
        g = a + layer.mlp(layer.post_attention_layernorm(a))
        outputs.append(g)
    return outputs


def test_training_time_test_written_out(target: Target) -> None:
    drafter = _eagle3(target, steps=4)
    tokens_T = torch.randint(3, target.vocab_size, (17,))
    features = target.forward(tokens_T[None], layers=drafter.feature_layers)
    expected = _by_hand(drafter, target, tokens_T, 4)
    for depth, out in zip(drafter.unroll(features, tokens_T[None]), expected, strict=True):
        torch.testing.assert_close(
            depth.states_BNd[0, : len(out)], drafter.norm(out), rtol=1e-4, atol=1e-4
        )
        assert depth.feature_BNd is None


def test_gradients_run_through_all_steps(target: Target) -> None:
    """d(loss of the last step) / d(every weight) is that of the written-out computation."""
    drafter = _eagle3(target, steps=3)
    tokens_T = torch.randint(3, target.vocab_size, (12,))
    features = target.forward(tokens_T[None], layers=drafter.feature_layers)
    depths = list(drafter.unroll(features, tokens_T[None]))
    names, weights = zip(
        *[(n, p) for n, p in drafter.named_parameters() if not n.startswith("lm_head")], strict=True
    )
    ours = torch.autograd.grad(depths[-1].states_BNd[0, :9].square().sum(), weights)
    out = _by_hand(drafter, target, tokens_T, 3)[-1]
    theirs = torch.autograd.grad(drafter.norm(out).square().sum(), weights)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=name)
    # C only acts at the first step, yet learns from the last.
    assert float(ours[names.index("fc.weight")].abs().max()) > 0


def test_layers_heads_and_sizes_follow_the_paper(target: Target) -> None:
    """3d^2 + (q, k, v from 2d) + o + 3dF + 4d + D d, and layers 2, L/2, L-3 (here L = 4)."""
    drafter = _eagle3(target, draft_vocab_size=64)
    assert drafter.feature_layers == (2, 2, 1)
    assert drafter.num_depths == 7
    assert drafter.max_depth is None
    d, F_, d_kv = target.hidden_size, target.config.intermediate_size, 2 * 8
    expected = 3 * d * d + 2 * d * (d + 2 * d_kv) + d * d + 3 * d * F_ + 4 * d + 64 * d
    assert sum(p.numel() for p in drafter.parameters()) == expected


def test_the_start_is_the_targets_head_and_norm(target: Target) -> None:
    torch.manual_seed(0)
    drafter = Eagle3(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        draft_vocab_size=8,
        head=OWN,
    )
    ids_D = torch.tensor([3, 5, 8, 13, 21, 34, 55, 89])
    drafter.set_vocab(ids_D)
    norm = target.model.model.norm
    before = norm.weight.clone()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        drafter.bind(target).init_from(target)
        rows_Dd = target.head_weight_Vd[ids_D] * norm.weight
        expected = norm.weight / rows_Dd.square().sum(-1).mean().sqrt()
        torch.testing.assert_close(drafter.norm.weight, expected, rtol=1e-4, atol=1e-4)
        norm.weight.copy_(before)
    states = torch.randn(3, target.hidden_size)
    logits = F.linear(states, target.head_weight_Vd[ids_D])
    torch.testing.assert_close(drafter.head(0)(states), logits)


def test_training_does_not_begin_under_other_norms(target: Target) -> None:
    earlier, later = _eagle3(target, norm_before_residual=True), _eagle3(target)
    with pytest.raises(ValueError, match=r"give drafter\.norm_before_residual=true"):
        later.start_from(earlier)
    again = _eagle3(target, norm_before_residual=True)
    with torch.no_grad():
        again.fc.weight.zero_()
    again.start_from(earlier)
    assert torch.equal(again.fc.weight, earlier.fc.weight)


def test_the_normed_feature_is_the_residual(target: Target) -> None:
    plain, normed = _eagle3(target), _eagle3(target, norm_before_residual=True)
    e, g = torch.randn(2, 5, target.hidden_size, generator=torch.Generator().manual_seed(0))
    z, residual = normed.mix(e, g)
    assert torch.equal(residual, normed.hidden_norm(g))
    assert torch.equal(z, plain.mix(e, g)[0])
    assert torch.equal(plain.mix(e, g)[1], g)
