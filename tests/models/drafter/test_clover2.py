"""Clover-2's own maths; the contract tests cover the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, Qwen3Config

from models.drafter.base import Frontier
from models.drafter.clover2 import Clover2, GatedToken
from models.target import Target
from tests.tiny import tiny_target, tiny_tokenizer

HEAD = {"_target_": "models.head.frozen.FrozenHead"}


def clover(target: Target, **changes: Any) -> Clover2:
    torch.manual_seed(0)
    drafter = Clover2(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_config=target.plain_config,
        head=HEAD,
        **changes,
    )
    drafter.bind(target).init_from(target)
    return drafter.eval()


def by_hand(block: GatedToken, x: Tensor, y: Tensor) -> Tensor:
    """x + v(y) cos(q(rms x), k(y)) for single vectors, head by head."""
    x_normed = block.norm.weight * x / (x.pow(2).mean() + 1e-6).sqrt()
    q, k, v = block.query(x_normed), block.key(y), block.value(y)
    size = len(x) // block.num_heads
    parts = []
    for start in range(0, len(x), size):
        here = slice(start, start + size)
        cosine = q[here] @ k[here] / (q[here].norm() * k[here].norm())
        parts.append(cosine * v[here])
    return x + torch.cat(parts)


@pytest.mark.parametrize("read", ["residual", "final"])
def test_depths_follow_the_equations(target: Target, read: Any) -> None:
    drafter = clover(target, input=read, num_heads=3)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(3, target.vocab_size, (1, 9))
    features = target.forward(tokens, layers=drafter.feature_layers)
    given = features.layers[4][0] if read == "residual" else features.final_BTd[0]
    told = target.head_weight_Vd[tokens[0]]
    t = 4
    rows = [by_hand(drafter.first, given[u], told[u + 1]) for u in range(t + 1)]
    state = drafter.inner(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0, t]
    for k, depth in enumerate(drafter.unroll(features, tokens)):
        if k == 0:
            z = drafter.first_out(state)
        else:
            state = by_hand(drafter.later, state, told[t + 1 + k])
            z = drafter.later_out(torch.cat([state, told[t + 1 + k]]))
        out = drafter.out_norm(z)
        torch.testing.assert_close(depth.states_BNd[0, t], out, rtol=1e-4, atol=1e-4)
        assert depth.feature_BNd is depth.states_BNd  # it predicts f_{t+1+k}
        logits = target.head_weight_Vd @ out
        torch.testing.assert_close(depth.head(depth.states_BNd[0, t]), logits, rtol=1e-3, atol=1e-3)
        assert depth.shift == 1 + k


def test_cosine_of_a_token_with_itself_adds_its_whole_value() -> None:
    """x = y of norm sqrt(d), identities for q, k and v: x + 1.0 x; the opposite token: x - ..."""
    block = GatedToken(hidden_size=8, num_heads=2)
    with torch.no_grad():
        for linear in (block.query, block.key, block.value):
            linear.weight.copy_(torch.eye(8))
    x = torch.tensor([1.0, -1.0] * 4)
    torch.testing.assert_close(block(x, x), 2 * x)
    torch.testing.assert_close(block(x, -x), 2 * x)  # cos = -1 and v = -x
    y = torch.tensor([1.0, 1.0] * 4)
    torch.testing.assert_close(block(x, y), x)  # at right angles: nothing


def test_starts_from_the_targets_last_layers_and_final_norm() -> None:
    target = tiny_target(6)
    decoder = target.model.get_decoder()
    with torch.no_grad():
        decoder.norm.weight.uniform_(0.5, 1.5)
    drafter = clover(target, num_layers=2, gates="published")
    for ours, theirs in zip(drafter.inner.layers, decoder.layers[2:], strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight)
    for norm in (drafter.inner.norm.weight, drafter.out_norm.weight):
        torch.testing.assert_close(norm, decoder.norm.weight)
    assert drafter.out_norm.weight is not drafter.inner.norm.weight
    weight = drafter.later_out.weight.detach()
    extra = weight - torch.eye(32, 64)
    assert float(extra.min()) >= 0
    assert float(extra.max()) <= 0.01 + 1e-6
    assert float(extra.mean()) == pytest.approx(0.005, rel=0.1)
    assert float(drafter.first.value.weight.detach().max()) <= 0.01


@pytest.mark.parametrize("read", ["residual", "final"])
def test_gates_begin_by_telling_tokens_in_the_size_of_states(target: Target, read: Any) -> None:
    """x + about 0.7 of y, y made as large as the state typically is."""
    drafter = clover(target, input=read, num_heads=3)
    texts = [torch.randint(3, target.vocab_size, (40,)) for _ in range(4)]
    drafter.init_from(target, texts)
    features = target.forward(texts[0][None], layers=drafter.feature_layers)
    streams = {"residual": features.layers.get(4), "final": features.final_BTd}
    told = drafter._told(texts[0][1:])

    def size(x: Tensor) -> float:
        return float(x.square().mean(-1).sqrt().median())

    for gate, given in ((drafter.first, streams[read]), (drafter.later, streams["final"])):
        assert given is not None
        states = given[0, :-1]
        added = (gate(states, told) - states).detach()
        ratio = (added * told).sum(-1) / told.square().sum(-1)  # times y, along y
        cosine = torch.nn.functional.cosine_similarity(added, told, dim=-1)
        assert float(cosine.mean()) > 0.9
        assert float(ratio.mean()) * size(target.head_weight_Vd) == pytest.approx(
            0.7 * size(states), rel=0.3
        )


def test_parameter_count(target: Target) -> None:
    """Two gated tokens (3 (d^2 + d) + d each), M_1, M_2, two norms, the layers; no vocabulary."""
    drafter, d = clover(target, num_layers=1), target.hidden_size
    layer = sum(p.numel() for p in target.model.get_decoder().layers[3].parameters())
    gates = 2 * (3 * (d * d + d) + d)
    outs = d * d + d + 2 * d * d + d
    assert sum(p.numel() for p in drafter.parameters()) == gates + outs + 2 * d + layer


SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 2,
    "eos_token_id": 2,
}
RELATIVES = {
    "qwen3": Qwen3Config(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=6, query_pre_attn_scalar=8),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_other_architectures_draft_as_they_train(name: str) -> None:
    """Norms in heads, 1 + w norms, windows: layers of the target's own kind, read in pieces."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(RELATIVES[name])
    target = Target(model=model, tokenizer=tiny_tokenizer(), name=name)
    drafter = clover(target, num_heads=3)
    tokens = torch.randint(3, target.vocab_size, (1, 20))
    features = target.forward(tokens, layers=drafter.feature_layers)
    depths = list(drafter.unroll(features, tokens))
    state = drafter.start(features[:, :4], tokens[:, :5])
    for first, last in ((4, 5), (5, 9), (9, 12)):
        state = drafter.extend(state, features[:, first:last], tokens[:, first + 1 : last + 1])
    t = 11
    for k in range(3):
        node = Frontier(tokens[0, t + 1 + k : t + 2 + k], torch.zeros(1, dtype=torch.long))
        state, states = drafter.step(state, k, node)
        torch.testing.assert_close(states[0], depths[k].states_BNd[0, t], rtol=1e-4, atol=1e-4)


def test_more_layers_than_the_target_has(target: Target) -> None:
    with pytest.raises(ValueError, match=r"num_layers=5 should lie between 1 and 4"):
        clover(target, num_layers=5)
