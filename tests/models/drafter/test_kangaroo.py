"""Kangaroo's equations by hand, and that the target's first layers are never run twice.

Shape legend: T positions, H heads, c channels of a head, d hidden size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.prompts import Prompt
from decode.answers import record
from decode.bandwidth import count_reads
from decode.replay import replay
from decode.session import Decoder
from decode.stop.confidence import Confidence
from decode.tree.chain import Chain
from decode.tree.dynamic import Dynamic
from decode.tree.static import StaticTree
from decode.verifier.sampling import Sampling
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.drafter.kangaroo import Kangaroo
from models.split import SplitTarget
from models.target import Target
from models.tree import Tree
from tests.models.test_split import ARCHITECTURES
from tests.models.test_split import make as make_target
from tests.tiny import tiny_target

FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
ACCURACY = [[0.5, 0.3, 0.1], [0.4, 0.3, 0.2], [0.4, 0.2, 0.1]]
PROMPTS = [[5, 9, 17, 30, 44, 100], [7], [60, 61, 62]]


def make(target: Target, *, layers: int = 2, **settings: Any) -> Kangaroo:
    """A random Kangaroo that accepts some and refuses some."""
    torch.manual_seed(0)
    drafter = Kangaroo(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        shallow_layers=layers,
        head=FROZEN,
        **settings,
    )
    drafter.bind(target)
    drafter.init_from(target)
    return drafter.eval()


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(5)


def rms(x_Td: Tensor, weight_d: Tensor) -> Tensor:
    return x_Td / (x_Td.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight_d


def rotated(x_THc: Tensor, theta: float) -> Tensor:
    """Channel i of the first half turns with channel i of the second by t theta^(-2i/c)."""
    T, _, c = x_THc.shape
    angle_Tc = torch.arange(T)[:, None] * theta ** (-torch.arange(0, c, 2) / c)
    cos, sin = angle_Tc.cos()[:, None], angle_Tc.sin()[:, None]
    a, b = x_THc.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@torch.no_grad()
def test_states_by_hand(target: Target) -> None:
    drafter = make(target)
    for parameter in drafter.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    tokens_1T = torch.randint(3, target.vocab_size, (1, 9))
    features = target.forward(tokens_1T, layers=(2,))
    (depth,) = drafter.unroll(features, tokens_1T)
    assert depth.shift == 0

    adapter, T = drafter.adapter, 9
    u_Td = features.layers[2][0]
    z_Td = rms(u_Td, adapter.norm_in.weight)
    w = adapter.attention
    q, k, v = ((z_Td @ m.weight.T).view(T, -1, 8) for m in (w.q_proj, w.k_proj, w.v_proj))
    q, k = rotated(q, 10_000.0), rotated(k, 10_000.0)
    mixed = []
    for head in range(4):  # two heads share keys and values
        scores_TT = q[:, head] @ k[:, head // 2].T / math.sqrt(8)
        scores_TT[torch.ones(T, T).triu(1).bool()] = -math.inf
        mixed.append(scores_TT.softmax(-1) @ v[:, head // 2])
    attended_Td = torch.cat(mixed, dim=-1) @ w.o_proj.weight.T
    expected_Td = rms(u_Td + attended_Td, adapter.norm_out.weight)
    torch.testing.assert_close(depth.states_BNd[0], expected_Td, rtol=1e-4, atol=1e-4)


def test_parameters_are_attention_and_two_norms(target: Target) -> None:
    drafter = make(target, draft_vocab_size=50)
    d, c = 32, 8
    assert sum(p.numel() for p in drafter.parameters()) == d * (4 + 2 + 2) * c + 4 * c * d + 2 * d
    torch.testing.assert_close(
        drafter.adapter.norm_out.weight.data, target.model.get_decoder().norm.weight.data
    )


@torch.no_grad()
def test_states_read_the_shallow_layer_and_nothing_behind_it(target: Target) -> None:
    drafter = make(target)
    tokens_1T = torch.randint(3, target.vocab_size, (1, 12))
    features = target.forward(tokens_1T, layers=(2,))
    (before,) = drafter.unroll(features, tokens_1T)
    features.final_BTd.fill_(7.0)
    (same,) = drafter.unroll(features, tokens_1T)
    assert torch.equal(before.states_BNd, same.states_BNd)
    features.layers[2][:, 6:] += 1.0
    (after,) = drafter.unroll(features, tokens_1T)
    changed_T = (before.states_BNd - after.states_BNd).abs().amax(-1)[0] > 1e-5
    assert changed_T.tolist() == [False] * 6 + [True] * 6


# --- sharing --------------------------------------------------------------------------------------


class Pruned(Policy):
    """A static tree of which only some nodes are verified."""

    name = "pruned"

    def __init__(self) -> None:
        self.inner = StaticTree(nodes=14, accuracy_KR=ACCURACY)

    def grow(
        self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: Drafter
    ) -> Children | None:
        return self.inner.grow(depth, frontier, logits_ND, drafter)

    def finish(self, tree: Tree) -> Tree:
        keep = [0]
        for node in range(1, len(tree)):
            if int(tree.parents_N[node]) in keep and node % 4 != 1:
                keep.append(node)
        return tree.keep(torch.tensor(keep))


POLICIES: dict[str, Callable[[], Policy]] = {
    "chain": lambda: Chain(gamma=4),
    "one": lambda: Chain(gamma=1),
    "static": lambda: StaticTree(nodes=14, accuracy_KR=ACCURACY),
    "pruned": Pruned,
    "dynamic": lambda: Dynamic(nodes=12, depth=4, top_k=4),
    "stopped": lambda: Chain(gamma=5, stop=Confidence(threshold=0.3)),
}


def count_tokens(target: Target, layer: int) -> tuple[list[int], Any]:
    """Notes how many tokens each call of a layer reads, until the hook is removed."""
    seen: list[int] = []
    module = target.model.get_decoder().layers[layer]
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    return seen, hook


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shape", list(POLICIES))
def test_every_layer_sees_every_token_once(target: Target, shape: str, layers: int) -> None:
    """Prompt and nodes: the shallow layers too, though drafter and verifier both need them."""
    drafter = make(target, layers=layers)
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=POLICIES[shape]())
    plain = Decoder(target=target, drafter=None, verifier=Sampling(), policy=None)
    accepted = 0
    for prompt in PROMPTS:
        truth = plain.generate(prompt, max_new_tokens=24, stop_at_eos=False).tokens
        counted = [count_tokens(target, layer) for layer in range(4)]
        made = decoder.generate(prompt, max_new_tokens=24, stop_at_eos=False)
        for _, hook in counted:
            hook.remove()
        assert made.tokens == truth
        accepted += sum(r.accepted for r in made.rounds)
        read = [sum(seen) for seen, _ in counted]
        verified = len(prompt) + sum(r.nodes for r in made.rounds)
        assert read[layers:] == [verified] * (4 - layers)
        # Nodes that were extended and then left out of the tree have cost something.
        left_out = read[0] - verified
        assert read[:layers] == [verified + left_out] * layers
        assert left_out > 0 if shape == "pruned" else left_out == 0 or shape == "dynamic"
    assert accepted > 0, "nothing was accepted, so nothing was kept"


@torch.no_grad()
@pytest.mark.parametrize("shape", list(POLICIES))
def test_the_decoder_reads_the_features_of_a_fresh_forward(target: Target, shape: str) -> None:
    drafter = make(target)
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=POLICIES[shape]())
    read = []
    made = decoder.generate(
        PROMPTS[0], max_new_tokens=20, stop_at_eos=False, on_read=lambda f: read.append(f)
    )
    assert any(r.accepted for r in made.rounds)
    final_Td = torch.cat([f.final_BTd[0] for f in read])
    inner_Td = torch.cat([f.layers[2][0] for f in read])
    tokens = torch.tensor([PROMPTS[0] + made.tokens])
    fresh = target.forward(tokens, layers=(2,))
    length = min(len(final_Td), tokens.shape[1])
    torch.testing.assert_close(final_Td[:length], fresh.final_BTd[0, :length], rtol=0, atol=1e-4)
    torch.testing.assert_close(inner_Td[:length], fresh.layers[2][0, :length], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("shape", list(POLICIES))
def test_states_are_the_same_with_and_without_a_shared_cache(target: Target, shape: str) -> None:
    """Round after round: what the drafter remembers, and what the target has put away."""
    drafter = make(target)
    for linear in drafter.adapter.attention.children():
        linear.weight.mul_(3.0)  # type: ignore[operator]
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=POLICIES[shape]())
    text, step, steps = PROMPTS[0], drafter.step, []

    def noted(state: Any, depth: int, frontier: Frontier) -> tuple[Any, Tensor]:
        state, states_Nd = step(state, depth, frontier)
        steps.append((depth, states_Nd))
        return state, states_Nd

    drafter.step = noted  # type: ignore[method-assign]
    made = decoder.generate(text, max_new_tokens=40, stop_at_eos=False)
    shared, at = list(steps), 1
    if shape != "static":
        assert any(r.accepted == r.depth for r in made.rounds), "a leaf should be accepted once"
    for done in made.rounds:
        steps.clear()
        tokens_1T = torch.tensor([text + made.tokens[:at]])
        features = target.forward(tokens_1T[:, :-1], layers=(2,))
        state = drafter.start(features, tokens_1T)
        drafter.propose(state, tokens_1T[0, -1:], POLICIES[shape]())
        for depth, states_Nd in steps:
            depth_there, found_Nd = shared.pop(0)
            assert depth == depth_there
            torch.testing.assert_close(found_Nd, states_Nd, rtol=0, atol=1e-4)
        at += done.produced
    assert not shared


@torch.no_grad()
def test_a_replay_counts_what_the_decoder_counts(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    drafter = make(target)
    prompts = [Prompt(f"set/{i}", tokens, "all") for i, tokens in enumerate(PROMPTS)]
    recording = record(target, prompts, bench="three", max_new_tokens=24)
    replayed = replay(target=target, drafter=drafter, recording=recording, gammas=[1, 3])
    for gamma in (1, 3):
        decoder = Decoder(
            target=target, drafter=drafter, verifier=Sampling(), policy=Chain(gamma=gamma)
        )
        rounds = [r for p in prompts for r in decoder.generate(p.tokens, max_new_tokens=24).rounds]
        tau = sum(r.produced for r in rounds) / len(rounds)
        assert replayed.chain(gamma).tau.value == pytest.approx(tau)
        assert replayed.chain(gamma).rounds == pytest.approx(len(rounds))


@pytest.mark.parametrize("shape", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_decodes_as_without_a_drafter(name: str, shape: str) -> None:
    """Texts longer than the windows of layers that have one; each layer reads each node once."""
    target = make_target(ARCHITECTURES[name]())
    drafter = make(target)
    plain = Decoder(target=target, drafter=None, verifier=Sampling(), policy=None)
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=POLICIES[shape]())
    for prompt in PROMPTS[:2]:
        truth = plain.generate(prompt, max_new_tokens=16, stop_at_eos=False).tokens
        made = decoder.generate(prompt, max_new_tokens=16, stop_at_eos=False)
        assert made.tokens == truth


def test_a_draft_that_was_not_verified_is_forgotten(target: Target) -> None:
    """Drafting again from the same root gives the same draft."""
    from models.cache import GrowingCache

    drafter, cache = make(target), GrowingCache()
    tokens_1T = torch.tensor([PROMPTS[0]])
    features = target.forward(tokens_1T[:, :-1], layers=(2,), cache=cache)
    state, shared = drafter.start_shared(features, tokens_1T, cache)
    first = drafter.propose(state, tokens_1T[0, -1:], Chain(gamma=3))
    again = drafter.propose(state, tokens_1T[0, -1:], Chain(gamma=3))
    assert torch.equal(first.tokens_N, again.tokens_N)
    found = shared.verify(again).final_BTd
    text = torch.cat([tokens_1T[:, :-1], again.tokens_N[None]], dim=1)
    expected = target.forward(text).final_BTd[:, -4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_draft_costs_its_own_weights_and_the_layers_it_runs(target: Target) -> None:
    """gamma times: two layers of the target, the adapter, the head."""
    drafter = make(target, draft_vocab_size=40)
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=Chain(gamma=3))
    with count_reads(drafter) as counter:
        decoder.generate([5, 9], max_new_tokens=1, stop_at_eos=False)
        prompt = counter.read
        rounds = decoder.generate([5, 9], max_new_tokens=9, stop_at_eos=False).rounds
    layers = sum(p.numel() for p in target.model.get_decoder().layers[:2].parameters())
    adapter = sum(p.numel() for p in drafter.adapter.parameters())
    assert prompt == 4 * adapter  # the target's forward read its own layers
    assert counter.read == 2 * prompt + len(rounds) * 3 * 4 * (layers + adapter + 40 * 32)


def test_refusals(target: Target) -> None:
    with pytest.raises(ValueError, match=r"shallow_layers=0 should be 1 or more"):
        make(target, layers=0)
    with pytest.raises(ValueError, match=r"cannot be split after 4 of its 4 layers"):
        SplitTarget(target=target, at=4)
