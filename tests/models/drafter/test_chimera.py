"""Chimera's own maths; the contract tests cover the rest."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.drafter.base import Frontier
from models.drafter.chimera import Chimera, ContextEncoder
from models.target import Target

OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}


def chimera(target: Target, **changes: Any) -> Chimera:
    torch.manual_seed(0)
    given: dict[str, Any] = {"head": OWN} | changes
    drafter = Chimera(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        **given,
    )
    drafter.bind(target).init_from(target)
    return drafter.eval()


def text(target: Target) -> Tensor:
    return torch.randint(3, target.vocab_size, (1, 9), generator=torch.Generator().manual_seed(1))


def layer_by_hand(encoder: ContextEncoder, rows: Tensor, positions: list[int]) -> Tensor:
    """A Llama decoder layer over `rows`, whose last one sees all of them: its output."""
    z = encoder.input_layernorm(rows)
    attention = encoder.self_attn
    q = attention.q_proj(z[-1:]).view(1, 4, 8).transpose(0, 1)
    k, v = (p(z).view(len(z), 2, 8).transpose(0, 1) for p in (attention.k_proj, attention.v_proj))
    cos, sin = encoder.rotary(z[None], torch.tensor([positions]))
    q = apply_rotary_pos_emb(q[None], q[None], cos[:, -1:], sin[:, -1:])[0][0]
    k = apply_rotary_pos_emb(k[None], k[None], cos, sin)[0][0]
    read = []
    for head in range(4):  # two query heads share a key head
        weights = (q[head] @ k[head // 2].T / 8**0.5).softmax(-1)
        read.append((weights @ v[head // 2])[0])
    a = rows[-1] + attention.o_proj(torch.cat(read))
    return a + encoder.mlp(encoder.post_attention_layernorm(a))


def test_the_encoder_sees_features_up_to_t_and_trigrams_up_to_the_draft(target: Target) -> None:
    """c^k_t for one position, from the rows it may see and no mask."""
    drafter = chimera(target, num_heads=3)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = text(target)
    features = target.forward(tokens)
    final = features.final_BTd[0]
    embedded = target.embed(tokens[0])
    residual, project = drafter.trigram[0], drafter.trigram[1]

    def trigram(i: int) -> Tensor:
        z = torch.cat([embedded[max(0, i - 2)], embedded[i - 1], embedded[i]])
        return project(z + F.silu(residual.linear(z)))  # type: ignore[operator]

    for t in (0, 1, 4):
        for k, depth in enumerate(drafter.unroll(features, tokens)):
            reads = [*range(t + 1)], [*range(1, t + 2 + k)]
            rows = torch.stack([*final[: t + 1], *(trigram(i) for i in reads[1])])
            context = layer_by_hand(drafter.encoder, rows, [*reads[0], *reads[1]])
            state = torch.cat([final[t], context])
            torch.testing.assert_close(depth.states_BNd[0, t], state, rtol=1e-4, atol=1e-4)
            assert depth.shift == 1 + k


def test_heads_start_as_the_targets_own_on_both_halves(target: Target) -> None:
    """[W, W] [f; c] = W (f + c), which is what the frozen head reads."""
    joined, added = chimera(target, draft_vocab_size=40), chimera(target, head=FROZEN)
    added.trigram.load_state_dict(joined.trigram.state_dict())
    added.encoder.load_state_dict(joined.encoder.state_dict())
    assert (joined.state_size, added.state_size) == (64, 32)
    features, tokens = target.forward(text(target)), text(target)
    pairs = zip(joined.unroll(features, tokens), added.unroll(features, tokens), strict=True)
    for own, frozen in pairs:
        torch.testing.assert_close(
            own.head(own.states_BNd),
            frozen.head(frozen.states_BNd)[..., :40],
            rtol=1e-4,
            atol=1e-4,
        )


def test_parameter_count(target: Target) -> None:
    """(3d)^2 + 3d for R, 3d^2 + d for P, one layer, and 2dD for each head."""
    drafter, d = chimera(target, num_heads=4, draft_vocab_size=40), target.hidden_size
    layer = 2 * (d * 32 + d * 16) + 3 * d * 64 + 2 * d
    trigram = (3 * d) ** 2 + 3 * d + 3 * d * d + d
    expected = trigram + layer + 4 * 2 * d * 40
    assert sum(p.numel() for p in drafter.parameters()) == expected


def test_a_drafted_trigram_holds_the_tokens_of_its_own_path(target: Target) -> None:
    """The third token of a path reads both before it: changing either changes its state."""
    drafter, tokens = chimera(target), text(target)
    features = target.forward(tokens)
    zero = torch.zeros(1, dtype=torch.long)
    start = drafter.start(features[:, :5], tokens[:, :6])
    state, _ = drafter.step(start, 0, Frontier(tokens[0, 5:6], zero))
    state, _ = drafter.step(state, 1, Frontier(torch.tensor([7, 8]), zero.expand(2)))
    nodes = Frontier(torch.tensor([9, 9]), torch.tensor([1, 0]))
    state, states = drafter.step(state, 2, nodes)
    assert state.recent_N2 is not None
    assert state.recent_N2.tolist() == [[8, 9], [7, 9]]
    assert not torch.allclose(states[0], states[1], atol=1e-3)
    assert start.recent_N2 is not None
    assert start.recent_N2.tolist() == [tokens[0, 4:6].tolist()]
