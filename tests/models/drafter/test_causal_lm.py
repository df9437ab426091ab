"""The small language model's own maths; the contract tests cover the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from models.drafter.base import Frontier
from models.drafter.causal_lm import CausalLm
from models.drafter.load import load_drafter
from models.head.tied import TiedHead
from models.lm_shape import kept_layers
from models.target import Target
from tests.tiny import tiny_tokenizer

FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
OWN = {"_target_": "models.head.own.OwnHead"}
TIED = {"_target_": "models.head.tied.TiedHead"}


def small_lm(target: Target, calibration: Sequence[torch.Tensor] = (), **settings: Any) -> CausalLm:
    """A drafter as a run would start it."""
    torch.manual_seed(0)
    drafter = CausalLm(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_config=target.plain_config,
        **({"num_layers": 2, "head": FROZEN} | settings),
    )
    drafter.bind(target)
    drafter.init_from(target, calibration)
    return drafter.eval()


def text(target: Target, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(3, target.vocab_size, (1, length), generator=generator)


@pytest.mark.parametrize(
    ("keep", "count", "total", "expected"),
    [
        ("first", 3, 30, (0, 1, 2)),
        ("even", 1, 30, (0,)),
        ("even", 2, 30, (0, 29)),
        ("even", 4, 30, (0, 10, 19, 29)),  # 29/3 = 9.67 and 19.33
        ("even", 5, 5, (0, 1, 2, 3, 4)),
    ],
)
def test_which_layers_are_kept(keep: str, count: int, total: int, expected: tuple) -> None:
    assert kept_layers(keep, count, total) == expected


@pytest.mark.parametrize(
    "settings", [{"head": FROZEN}, {"head": OWN}, {"head": OWN, "embedding": "own"}]
)
def test_with_all_layers_it_is_the_target(target: Target, settings: dict[str, Any]) -> None:
    """Its states are the target's features, so q = p: alpha = 1 and KL(p || q) = 0 with shift 0,
    and neither with any other shift."""
    drafter = small_lm(target, num_layers=target.num_layers, **settings)
    tokens_BT = text(target)
    features = target.forward(tokens_BT)
    (depth,) = drafter.unroll(features, tokens_BT)
    logq_BTV = depth.head(depth.states_BNd).log_softmax(-1)
    logp_BTV = target.project(features.final_BTd).log_softmax(-1)
    assert depth.shift == 0
    for shift in (0, 1, 2):
        logp, logq = logp_BTV[:, shift:], logq_BTV[:, : logq_BTV.shape[1] - shift]
        alpha = torch.minimum(logp.exp(), logq.exp()).sum(-1).mean()
        kl = (logp.exp() * (logp - logq)).sum(-1).mean()
        if shift == 0:
            assert alpha > 1 - 1e-5
            assert kl < 1e-6
        else:
            assert alpha < 0.9
            assert kl > 0.1


def test_kept_layers_carry_the_targets_weights(target: Target) -> None:
    drafter = small_lm(target, num_layers=2, keep="even")
    theirs = target.model.get_decoder()
    for ours, layer in zip(drafter.inner.layers, (theirs.layers[0], theirs.layers[3]), strict=True):
        for name, weight in ours.named_parameters():
            assert torch.equal(weight, layer.get_parameter(name)), name
    assert torch.equal(drafter.inner.norm.weight, theirs.norm.weight)
    assert drafter.inner.get_parameter("layers.0.mlp.up_proj.weight").requires_grad
    assert not any("embed" in name for name in drafter.state_dict())


def test_keys_of_accepted_drafts_are_kept(target: Target) -> None:
    """After a tree, only what was not read is read: one forward of the root and the last draft."""
    drafter = small_lm(target)
    tokens = text(target)[:, :7]
    state = drafter.start(target.forward(tokens[:, :6]), tokens)
    zero = torch.zeros(1, dtype=torch.long)
    below, _ = drafter.step(state, 0, Frontier(tokens[0, -1:], zero))
    below, _ = drafter.step(below, 1, Frontier(torch.tensor([11, 12]), torch.tensor([0, 0])))
    drafter.step(below, 2, Frontier(torch.tensor([21, 22, 23]), torch.tensor([0, 1, 1])))
    assert state.memory.cache.get_seq_length() == 6 + 1 + 2 + 3
    # Accepted: 12, 23 (both read), then 30 (drafted, never read); 40 is the next root.
    state = drafter.extend(state, target.forward(tokens[:, :4]), torch.tensor([[12, 23, 30, 40]]))
    assert state.memory.length == 6 + 3
    assert state.memory.unread == [30, 40]
    _, states_1d = drafter.step(state, 0, Frontier(torch.tensor([40]), zero))
    assert state.memory.cache.get_seq_length() == 6 + 3 + 2
    whole = torch.cat([tokens, torch.tensor([[12, 23, 30, 40]])], dim=1)
    torch.testing.assert_close(states_1d[0], drafter.read(whole)[0, -1], rtol=1e-5, atol=1e-5)


def test_a_tied_head_trains_the_embedding_from_both_sides(target: Target) -> None:
    drafter = small_lm(target, embedding="own", head=TIED)
    embedding = drafter.inner.get_input_embeddings().weight
    assert drafter.vocab_head.weight is embedding
    assert sum(p is embedding for p in drafter.parameters()) == 1
    (depth,) = drafter.unroll(target.forward(text(target)), text(target))
    depth.head(depth.states_BNd).logsumexp(-1).sum().backward()
    unread = sorted(set(range(target.vocab_size)) - set(text(target)[0].tolist()))
    assert embedding.grad[unread].abs().sum() > 0


def test_the_same_drafter_serves_a_target_of_another_width(target: Target) -> None:
    """With an embedding and a head of its own it borrows nothing, so only the vocabulary counts."""
    wider = target.model.config.__class__(**(target.model.config.to_dict() | {"hidden_size": 48}))
    other = Target(
        model=type(target.model)(wider), tokenizer=target.tokenizer, name="a wider target"
    )
    small_lm(target, embedding="own", head=OWN).bind(other)
    with pytest.raises(ValueError, match="hidden size 32"):
        small_lm(target).bind(other)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_layers": 9}, "between 1 and 4"),
        ({"num_layers": None}, "num_layers is null"),
        ({"width": 16}, "does not read drafter.width=16"),
        ({"init": "source", "num_layers": None}, "drafter.source is null"),
        ({"init": "source", "source": "x"}, "does not read drafter.num_layers=2"),
        ({"init": "random", "width": 16}, "set drafter.embedding=own"),
        ({"init": "random", "width": 18, "embedding": "own", "head": OWN}, "shared by"),
        ({"head": TIED}, "set drafter.embedding=own"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    target: Target, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        small_lm(target, **settings)


def test_generator_samples_from_the_drafter(target: Target) -> None:
    """A batch of unequal prompts, greedy: each answer is the argmax chain of its own text."""
    from data_prep.generate import Generator, Request

    drafter = small_lm(target, draft_vocab_size=100, head=OWN)
    drafter.set_vocab(torch.arange(3, 103))
    drafter.init_from(target)
    assert drafter.draft_ids_D is not None
    prompts = [[5, 9, 17, 30, 44], [7], [60, 61, 62]]
    requests = [Request(str(i), p, 6) for i, p in enumerate(prompts)]
    generator = Generator(target=drafter.as_generator_target())  # type: ignore[arg-type]
    answers = {a.id: a.tokens for a in generator.answer_batch(requests)}
    for i, prompt in enumerate(prompts):
        known = list(prompt)
        for token in answers[str(i)]:
            logits_D = drafter.vocab_head(drafter.read(torch.tensor([known]))[0, -1])
            assert token == int(drafter.draft_ids_D[logits_D.argmax()])
            known.append(token)


def test_lora_merged_equals_unmerged_and_trains_adapters_only(
    target: Target, tmp_path: Path
) -> None:
    drafter = small_lm(target, lora={"r": 4, "alpha": 8}, embedding="own", head=TIED)
    trained = {name for name, p in drafter.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    plain = small_lm(target, embedding="own", head=TIED)
    tokens_BT = text(target)
    # B = 0: nothing has changed yet.
    torch.testing.assert_close(drafter.read(tokens_BT), plain.read(tokens_BT))
    for name, parameter in drafter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wanted = drafter.read(tokens_BT)
    assert (wanted - plain.read(tokens_BT)).abs().max() > 0.1
    torch.testing.assert_close(drafter.merged().read(tokens_BT), wanted, rtol=1e-4, atol=1e-4)
    # W + (alpha / r) B A, written out for one weight.
    layer: Any = drafter.inner.get_submodule("layers.1.mlp.up_proj")
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = drafter.merged().inner.get_parameter("layers.1.mlp.up_proj.weight")
    torch.testing.assert_close(merged, layer.base_layer.weight + 2.0 * product)
    drafter.save_pretrained(tmp_path)
    assert isinstance(drafter.vocab_head, TiedHead)
    assert drafter.vocab_head.weight is drafter.inner.get_input_embeddings().weight
    loaded = load_drafter(tmp_path, target)
    assert set(loaded.state_dict()) == set(plain.state_dict())
    # A run with adapters goes on from a plain drafter, and a checkpoint of its own is restored.
    again = small_lm(target, lora={"r": 4, "alpha": 8}, embedding="own", head=TIED)
    again.start_from(loaded)
    torch.testing.assert_close(again.read(tokens_BT), wanted, rtol=1e-4, atol=1e-4)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    again.load_state_dict(drafter.state_dict())
    assert torch.equal(again.read(tokens_BT), wanted)


@pytest.mark.parametrize("lora", [{"alpha": 3}, {"r": 0}, {"r": 2, "rank": 3}])
def test_adapters_of_another_shape_are_refused(target: Target, lora: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set drafter\.lora=null"):
        small_lm(target, lora=lora)


def test_another_model_can_be_the_start(target: Target, tmp_path: Path) -> None:
    """A folder with the same tokenizer; its rows may be fewer than the target's padded ones."""
    folder = tmp_path / "small"
    settings = target.model.config.to_dict() | {"num_hidden_layers": 1, "hidden_size": 16}
    rows = target.vocab_size - 8
    torch.manual_seed(7)
    source = type(target.model)(LlamaConfig(**(settings | {"vocab_size": rows})))
    source.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    drafter = small_lm(
        target, init="source", source=str(folder), num_layers=None, embedding="own", head=OWN
    )
    tokens_BT = text(target).clamp(max=rows - 1)
    (depth,) = drafter.unroll(target.forward(tokens_BT), tokens_BT)
    logits_BTV = depth.head(depth.states_BNd)
    assert depth.states_BNd.shape[-1] == 16
    torch.testing.assert_close(logits_BTV[..., :rows], source.eval()(tokens_BT).logits)
    assert logits_BTV[..., rows:].abs().max() == 0
    other = Tokenizer(BPE({"a": 0, "b": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=other).save_pretrained(folder)
    with pytest.raises(ValueError, match="same tokenizer"):
        small_lm(
            target, init="source", source=str(folder), num_layers=None, embedding="own", head=OWN
        )


TINY: dict[str, Any] = {
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
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "qwen2": Qwen2Config(**TINY, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3": Qwen3Config(**TINY),
    "gemma2": Gemma2Config(**TINY, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**TINY, sliding_window=6, query_pre_attn_scalar=8),
}


@pytest.fixture(params=FAMILIES)
def relative(request: pytest.FixtureRequest) -> Target:
    """A tiny target of another architecture: biases, norms in heads, scaled embeddings, windows."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
    return Target(model=model, tokenizer=tiny_tokenizer(), name=request.param)


@pytest.mark.parametrize(("embedding", "head"), [("target", FROZEN), ("own", OWN)])
def test_other_architectures(relative: Target, embedding: str, head: dict[str, Any]) -> None:
    """All layers kept are the target; two layers draft, in a chain and in a tree, as they train."""
    tokens_BT = text(relative)
    features = relative.forward(tokens_BT)
    whole = small_lm(relative, num_layers=4, embedding=embedding, head=head)
    torch.testing.assert_close(whole.read(tokens_BT), features.final_BTd, rtol=1e-4, atol=1e-4)
    if head is FROZEN:  # with the soft cap of Gemma 2
        logits_BTV = whole.head(0)(whole.read(tokens_BT))
        expected_BTV = relative.project(features.final_BTd)
        torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-3)
    drafter = small_lm(relative, keep="even", embedding=embedding, head=head)
    expected_Td = drafter.read(tokens_BT)[0]
    state = drafter.start(features[:, :10], tokens_BT[:, :11])
    zero = torch.zeros(1, dtype=torch.long)
    for k in range(5):
        # Beside the true token another one is drafted at each depth: the mask must hide it.
        other = tokens_BT[0, 10 + k] + 1
        pair = torch.stack([tokens_BT[0, 10 + k], other % relative.vocab_size])
        nodes = Frontier(pair[:1], zero) if k == 0 else Frontier(pair, zero.expand(2))
        state, states_Nd = drafter.step(state, k, nodes)
        torch.testing.assert_close(states_Nd[0], expected_Td[10 + k], rtol=1e-4, atol=1e-4)
