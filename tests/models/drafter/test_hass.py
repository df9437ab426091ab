"""HASS's own maths, in the row system of its released code; the contract tests cover the rest.

Shape legend: T positions, H heads, c head size, d hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.drafter.eagle import Eagle
from models.drafter.hass import Hass
from models.target import Target

FROZEN = {"_target_": "models.head.frozen.FrozenHead"}


def _hass(target: Target, **settings: Any) -> Hass:
    torch.manual_seed(0)
    drafter = Hass(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=FROZEN,
        **settings,
    )
    drafter.bind(target)
    return drafter.eval()


def _forwards(drafter: Hass, target: Target, tokens_T: Tensor, count: int) -> list[Tensor]:
    """The aligned forwards, row by row, with one softmax over a list of keys.

    F^0 = f. Forward j has levels F^0..F^j: row r reads z = C [E(x_{r+1}); F^j_r], attends to level
    0 at columns c <= r-j and to level i = 1..j at column r-j+i. Its output moved right by one row,
    detached, is F^{j+1}; row 0 keeps f_0.
    """
    layer, attention = drafter.layer, drafter.layer.self_attn
    true = target.forward(tokens_T[None]).final_BTd[0]
    embedded = target.embed(tokens_T[1:])
    R = len(embedded)
    features, outputs = [true[:R]], []
    cos, sin = layer.rotary(true[None], torch.arange(R)[None])

    def heads(x: Tensor) -> Tensor:
        return x.view(1, R, -1, attention.head_dim).transpose(1, 2)

    def rotated(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(heads(x), heads(x), cos, sin)[0]

    for j in range(count):
        z = [drafter.fc(torch.cat([embedded, F], dim=-1)) for F in features]
        keys, values = [], []
        repeat = attention.num_key_value_groups
        for level in z:
            keys.append(rotated(attention.k_proj(level))[0].repeat_interleave(repeat, 0))
            values.append(heads(attention.v_proj(level))[0].repeat_interleave(repeat, 0))
        q = rotated(attention.q_proj(z[-1]))[0]
        rows = []
        for r in range(R):
            seen = [(0, c) for c in range(r - j + 1)]
            seen += [(i, r - j + i) for i in range(1, j + 1) if r - j + i >= 0]
            keys_HSc = torch.stack([keys[i][:, c] for i, c in seen], dim=1)
            values_HSc = torch.stack([values[i][:, c] for i, c in seen], dim=1)
            scores_HS = (q[:, r, None] * keys_HSc).sum(-1) / attention.head_dim**0.5
            rows.append((scores_HS.softmax(-1)[..., None] * values_HSc).sum(1).flatten())
        a = z[-1] + attention.o_proj(torch.stack(rows))
        out = a + layer.mlp(layer.post_attention_layernorm(a))
        outputs.append(out)
        features.append(torch.cat([true[:1], out[:-1].detach()]))
    return outputs


def test_forward_j_at_row_r_is_depth_j_at_index_r_minus_j(target: Target) -> None:
    """States and gradients (of all forwards together), for the rows that drafting ever makes."""
    drafter = _hass(target, steps=3)
    tokens_T = torch.randint(3, target.vocab_size, (14,))
    depths = list(drafter.unroll(target.forward(tokens_T[None]), tokens_T[None]))
    rows = _forwards(drafter, target, tokens_T, 3)
    R = len(rows[0])
    ours = theirs = torch.zeros(())
    for j, (depth, row) in enumerate(zip(depths, rows, strict=True)):
        found, expected = depth.states_BNd[0, : R - j], row[j:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert depth.shift == 1 + j
        ours, theirs = ours + found.square().sum(), theirs + expected.square().sum()
    weights = list(drafter.parameters())
    pairs = zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_no_gradient_between_the_forwards(target: Target) -> None:
    """The same states as EAGLE's net drafting, but another gradient from the second forward on."""
    hass = _hass(target, steps=2)
    eagle = Eagle(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=FROZEN,
    )
    eagle.load_state_dict(hass.state_dict())
    eagle.bind(target).eval()
    tokens_BT = torch.randint(3, target.vocab_size, (1, 10))
    features = target.forward(tokens_BT)
    second = list(hass.unroll(features, tokens_BT))[1]
    other = list(eagle.unroll_to(features, tokens_BT, 2))[1]
    torch.testing.assert_close(second.states_BNd, other.states_BNd)
    (detached,) = torch.autograd.grad(second.states_BNd.sum(), hass.fc.weight)
    (through,) = torch.autograd.grad(other.states_BNd.sum(), eagle.fc.weight)
    assert float((detached - through).abs().max()) > 1e-3
