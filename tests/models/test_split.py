"""A target run in two parts is the target, for every architecture, mask and cache.

Shape legend: B sequences, T positions, N tree nodes.
"""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from decode.session import tree_mask
from models.cache import GrowingCache, GrowingLayer
from models.lm_state import additive
from models.split import SharedLayers, SplitTarget
from models.target import Target
from models.tree import Tree
from tests.tiny import tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
WINDOW = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama scaled": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "qwen2": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, layer_types=WINDOW
    ),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=5, layer_types=WINDOW),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=5, layer_types=WINDOW),
}


def make(config: Any) -> Target:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation("eager" if config.model_type == "gemma2" else "sdpa")
    return Target(model=model, tokenizer=tiny_tokenizer(), name=config.model_type)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def target(request: pytest.FixtureRequest) -> Target:
    return make(ARCHITECTURES[request.param]())


def both(split: SplitTarget, tokens_BT: torch.Tensor, cache: Any = None, **how: Any) -> Any:
    hidden_BTd = split.shallow(tokens_BT, cache=cache, **how)
    return split.deep(hidden_BTd, cache=cache, **how)


def same(found: Any, expected: Any, at: int) -> None:
    torch.testing.assert_close(found.final_BTd, expected.final_BTd, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.layers[at], expected.layers[at], rtol=0, atol=2e-5)


def same_keys(found: GrowingCache, expected: GrowingCache) -> None:
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert isinstance(ours, GrowingLayer)
        assert isinstance(theirs, GrowingLayer)
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=2e-5)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_parts_are_the_whole(target: Target, at: int) -> None:
    split = SplitTarget(target=target, at=at)
    tokens_BT = torch.randint(3, 320, (2, 12))
    same(both(split, tokens_BT), target.forward(tokens_BT, layers=(at,)), at)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_parts_share_a_cache_with_the_whole(target: Target, at: int) -> None:
    """Read by the whole, then by parts, then by the whole again: longer than the windows."""
    split, cache, other = SplitTarget(target=target, at=at), GrowingCache(), GrowingCache()
    tokens_BT = torch.randint(3, 320, (1, 17))
    reads = [(0, 8, False), (8, 9, True), (9, 13, True), (13, 15, False), (15, 17, True)]
    for start, end, parts in reads:
        piece = tokens_BT[:, start:end]
        expected = target.forward(piece, cache=other, layers=(at,))
        whole = target.forward(piece, cache=cache, layers=(at,)) if not parts else None
        same(whole or both(split, piece, cache), expected, at)
    same_keys(cache, other)


def test_padding_and_given_positions(target: Target) -> None:
    split = SplitTarget(target=target, at=2)
    tokens_BT = torch.randint(3, 320, (2, 9))
    visible_BT = torch.ones(2, 9, dtype=torch.long)
    visible_BT[1, :3] = 0
    how: dict[str, Any] = {
        "attention_mask": visible_BT,
        "positions_BT": (visible_BT.cumsum(-1) - 1).clamp(min=0),
    }
    found, expected = both(split, tokens_BT, **how), target.forward(tokens_BT, **how, layers=(2,))
    seen = visible_BT.bool()
    same(found[seen], expected[seen], 2)


def part(mask: Any, node: int, columns: list[int]) -> Any:
    """The row of one node, some of its keys; where layers differ, for each kind."""
    if isinstance(mask, dict):
        return {kind: part(m, node, columns) for kind, m in mask.items()}
    return mask[:, :, [node]][..., columns]


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 1, 2, 4], [0], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("at", [1, 2])
def test_a_tree_drafted_in_any_order_is_the_tree(target: Target, at: int, order: list[int]) -> None:
    """Some nodes by the drafter, one after the other; the verifier completes and orders them."""
    parents = [-1, 0, 0, 1, 2, 2]
    depths = torch.tensor([0, 1, 1, 2, 2, 2])
    prompt_1T = torch.randint(3, 320, (1, 7))
    tokens_N = torch.randint(3, 320, (6,))
    full = tree_mask(parents, 7, torch.float32, torch.device("cpu"))
    at_N = 7 + depths
    at_K = torch.cat([torch.arange(7), at_N])
    mask = additive(full[0, 0] == 0, at_N, at_K, target.config, torch.float32)
    how: dict[str, Any] = {"attention_mask": mask, "positions_BT": at_N[None]}

    whole = GrowingCache()
    target.forward(prompt_1T, cache=whole)
    expected = target.forward(tokens_N[None], **how, cache=whole, layers=(at,))

    cache = GrowingCache()
    target.forward(prompt_1T, cache=cache)
    shared = SharedLayers(SplitTarget(target=target, at=at), cache)
    drafted: list[int] = []
    for node in order:
        drafted.append(node)
        columns = [*range(7), *(7 + n for n in drafted)]
        shared.draft(
            tokens_N[[node]][None],
            attention_mask=part(mask, node, columns),
            positions_BT=how["positions_BT"][:, [node]],
        )
    ones = torch.ones(6)
    tree = Tree(
        tokens_N, torch.tensor(parents), depths, ones, stepped_S=torch.tensor(order)
    )  # fmt: skip
    same(shared.verify(tree, **how), expected, at)
    same_keys(cache, whole)


def test_other_decoders_are_refused_or_right() -> None:
    """GPT-2 adds positions to the embedding and names its parts differently."""
    settings = GPT2Config(vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=128)
    with pytest.raises(ValueError, match=r"\(GPT2Model\) cannot be run in two parts"):
        SplitTarget(target=make(settings), at=2)
    phi = PhiConfig(**SHAPE)
    with pytest.raises(ValueError, match=r"\(PhiModel\) cannot be run in two parts"):
        SplitTarget(target=make(phi), at=2)


def test_a_decoder_that_does_more_than_its_layers_is_refused() -> None:
    """Here it scales what comes in, as Gemma once did: the second part would scale it again."""
    target = make(ARCHITECTURES["llama"]())
    decoder = target.model.get_decoder()

    def scale(_: Any, args: Any, given: dict[str, Any]) -> Any:
        tokens, embedded = given.pop("input_ids", None), given.get("inputs_embeds")
        embedded = decoder.embed_tokens(tokens) if embedded is None else embedded
        return args, given | {"inputs_embeds": embedded * 3.0}

    decoder.register_forward_pre_hook(scale, with_kwargs=True)
    with pytest.raises(ValueError, match=r"cannot be run in two parts \(hidden states differ by"):
        SplitTarget(target=target, at=2)
