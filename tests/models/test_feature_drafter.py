"""Feature drafters on targets of other architectures, with other rotary embeddings, and in trees.

Shape legend: B sequences, T positions, N nodes, d hidden size.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.greedy import Greedy
from models.drafter.base import Drafter, Frontier
from models.drafter.blocks import Rotary, layer_config
from models.drafter.eagle import Eagle
from models.drafter.eagle3 import Eagle3
from models.target import Target
from tests.tiny import tiny_tokenizer

SHAPE: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_positions": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "qwen3": {"head_dim": 16},  # norms of q and k, heads wider than hidden size / heads
    "gemma": {"tie_word_embeddings": True},  # scaled embeddings, norms of (1 + w)
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    },
}


def _target(kind: str) -> Target:
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(settings | ARCHITECTURES[kind]))
    model = AutoModelForCausalLM.from_config(config)
    return Target(model=model, tokenizer=tokenizer, name=kind)


def _drafter(target: Target, family: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    own = family is Eagle3
    drafter = family(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head={"_target_": f"models.head.{'own.OwnHead' if own else 'frozen.FrozenHead'}"},
        **settings,
    )
    drafter.bind(target).init_from(target)
    return drafter.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("family", [Eagle, Eagle3])
def test_targets_of_other_architectures(kind: str, family: type[Drafter]) -> None:
    """Unrolled = drafted, and decoding is the target's own, token for token."""
    target = _target(kind)
    drafter = _drafter(target, family)
    tokens_BT = torch.randint(3, target.vocab_size, (1, 40))
    features = target.forward(tokens_BT, layers=drafter.feature_layers)
    depths = list(drafter.unroll_to(features, tokens_BT, 4))
    t = 30
    state = drafter.start(features[:, : t + 1], tokens_BT[:, : t + 2])
    for k, depth in enumerate(depths):
        frontier = Frontier(tokens_BT[0, t + 1 + k : t + 2 + k], torch.zeros(1, dtype=torch.long))
        state, states_1d = drafter.step(state, k, frontier)
        torch.testing.assert_close(states_1d[0], depth.states_BNd[0, t], rtol=1e-4, atol=1e-4)
    assert drafter.layer.self_attn.head_dim == target.config.head_dim
    prompt = tokens_BT[0, :9].tolist()
    with torch.no_grad():
        truth = target.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False
        )[0, 9:]
    decoder = Decoder(target=target, drafter=drafter, verifier=Greedy(), policy=Chain(gamma=3))
    made = decoder.generate(prompt, max_new_tokens=12, stop_at_eos=False)
    assert made.tokens == truth.tolist()


@pytest.mark.parametrize("family", [Eagle, Eagle3])
def test_prompts_are_read_and_nothing_else_is_done_for_them(family: type[Drafter]) -> None:
    """20 prompt tokens, then 20 to learn, of which x_38 is the last label of depth 1."""
    target = _target("llama")
    drafter = _drafter(target, family, steps=3) if family is Eagle3 else _drafter(target, family)
    tokens_BT = torch.randint(3, target.vocab_size, (1, 40))
    taught_BT = torch.arange(40)[None] >= 19  # u teaches x_{u+1}
    taught_BT[0, 39] = False
    features = target.forward(tokens_BT, layers=drafter.feature_layers)
    rows: dict[str, list[int]] = {"q": [], "k": [], "mlp": []}
    attention = drafter.layer.self_attn
    modules = {"q": attention.q_proj, "k": attention.k_proj, "mlp": drafter.layer.mlp}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _module, _given, made, name=name: rows[name].append(made.shape[1])
        )
    list(drafter.unroll_taught(features, tokens_BT, drafter.num_depths, taught_BT))
    # t is taught at depth 0 from 18 to 37, and from 17 or 16 on at a later one.
    if family is Eagle3:
        assert rows == {"q": [22, 21, 21], "k": [40, 21, 21], "mlp": [22, 21, 21]}
    else:
        assert rows == {"q": [20], "k": [40], "mlp": [20]}


def test_gemmas_embedding_and_norm_are_read_as_the_target_uses_them() -> None:
    """E is scaled by sqrt(d); the final norm that EAGLE-3 starts from is 1 + w."""
    target = _target("gemma")
    ids = torch.tensor([5, 9])
    torch.testing.assert_close(target.embed(ids), target.embedding_weight_Vd[ids] * 32**0.5)
    norm = target.model.model.norm
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 0.5)
    drafter = _drafter(target, Eagle3)
    start = drafter.norm.weight * (1.0 + norm.weight)[0] / drafter.norm.weight[0]
    torch.testing.assert_close(start, 1.0 + norm.weight, rtol=1e-4, atol=1e-4)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_scaling_is_transformers_own(kind: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": kind, "rope_theta": 1000.0, **ROPES[kind]}
    config = layer_config(hidden_size=32, **SHAPE, rope_parameters=rope)
    x, positions = torch.zeros(1, 1, 32), torch.arange(100)[None]
    found, expected = Rotary(config)(x, positions), LlamaRotaryEmbedding(config)(x, positions)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = layer_config(hidden_size=32, **SHAPE, rope_theta=1000.0)
    assert not torch.allclose(Rotary(plain)(x, positions)[0], found[0])


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_partial_rotary_leaves_the_other_dimensions_alone(kind: str) -> None:
    """Half of 8 dimensions: angles t and t/10 (theta 100), then two of 0, in each half."""
    rope = {"rope_type": kind, "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    factor = 1.0
    if kind == "linear":
        factor = rope["factor"] = 2.0
    cos, sin = Rotary(layer_config(hidden_size=32, **SHAPE, rope_parameters=rope))(
        torch.zeros(1, 1, 32), torch.tensor([[3]])
    )
    angle = torch.tensor([3.0, 0.3, 0.0, 0.0]).repeat(2) / factor
    torch.testing.assert_close(cos[0, 0], angle.cos())
    torch.testing.assert_close(sin[0, 0], angle.sin())


def test_shapes_saved_before_rope_parameters_load() -> None:
    config = layer_config(hidden_size=32, **SHAPE, rope_theta=500.0)
    expected = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(Rotary(config).inv_freq, expected)


def _chain(drafter: Drafter, state: Any, tokens: list[int]) -> Tensor:
    """The state after a chain of these tokens."""
    states_1d = torch.empty(0)
    for k, token in enumerate(tokens):
        frontier = Frontier(torch.tensor([token]), torch.zeros(1, dtype=torch.long))
        state, states_1d = drafter.step(state, k, frontier)
    return states_1d[0]


@pytest.mark.parametrize("family", [Eagle, Eagle3])
def test_a_deep_tree_gives_each_node_its_own_path(target: Target, family: type[Drafter]) -> None:
    """Three levels with branches that end and branches that split = each path as a chain."""
    drafter = _drafter(target, family)
    tokens_BT = torch.randint(3, target.vocab_size, (1, 12))
    features = target.forward(tokens_BT, layers=drafter.feature_layers)
    start = drafter.start(features[:, :11], tokens_BT)
    root = int(tokens_BT[0, -1])
    length = start.cache.get_seq_length()
    state, _ = drafter.step(start, 0, Frontier(tokens_BT[0, -1:], torch.tensor([0])))
    state, _ = drafter.step(state, 1, Frontier(torch.tensor([7, 8, 9]), torch.tensor([0, 0, 0])))
    # Node 8 ends here; 9 has two children, 7 one.
    state, _ = drafter.step(state, 2, Frontier(torch.tensor([20, 21, 22]), torch.tensor([2, 0, 2])))
    _, found_Nd = drafter.step(
        state, 3, Frontier(torch.tensor([30, 31, 32, 33]), torch.tensor([0, 2, 1, 0]))
    )
    paths = [[9, 20, 30], [9, 22, 31], [7, 21, 32], [9, 20, 33]]
    expected = [_chain(drafter, start, [root, *path]) for path in paths]
    torch.testing.assert_close(found_Nd, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert start.cache.get_seq_length() == length == 11


@pytest.mark.parametrize("family", [Eagle, Eagle3])
def test_a_mistake_in_the_settings_is_named(target: Target, family: type[Drafter]) -> None:
    wrong = {"noise": -1.0} if family is Eagle else {"steps": 0}
    with pytest.raises(ValueError, match="drafter"):
        _drafter(target, family, **wrong)
    if family is Eagle3:
        with pytest.raises(ValueError, match="three layers"):
            _drafter(target, family, feature_layers=[1, 2])
        with pytest.raises(ValueError, match=r"between 0 .* and 3"):
            _drafter(target, family, feature_layers=[1, 2, 4])
