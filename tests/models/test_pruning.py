"""Which layers and channels matter, by hand; cutting to the full width changes nothing."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config

from models.drafter.causal_lm import CausalLm
from models.lm_weights import target_weights
from models.pruning import Scores, activation_scores, block_importance, cut
from models.target import Target
from tests.models.drafter.test_causal_lm import OWN, TINY, small_lm
from tests.tiny import tiny_target, tiny_tokenizer

TEXTS = list(torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(2)))


def test_importance_is_one_minus_the_cosine() -> None:
    """Against the residual stream itself; a layer that adds nothing has importance 0."""
    target = tiny_target()  # its weights are changed here
    layer = target.model.get_decoder().layers[1]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    importance_L = block_importance(target, TEXTS)
    assert importance_L[1] == pytest.approx(0.0, abs=1e-6)
    values = []
    for tokens in TEXTS:
        stream = target.forward(tokens[None], layers=(2, 3)).layers
        values.append(1 - F.cosine_similarity(stream[2][0], stream[3][0], dim=-1))
    assert importance_L[2] == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    drafter = small_lm(target, num_layers=3, keep="importance", calibration=TEXTS)
    kept = target.model.get_decoder().layers
    for ours, theirs in zip((0, 1, 2), (0, 2, 3), strict=True):
        assert torch.equal(
            drafter.inner.layers[ours].mlp.up_proj.weight, kept[theirs].mlp.up_proj.weight
        )


def test_no_text_no_importance(target: Target) -> None:
    with pytest.raises(ValueError, match="no calibration text"):
        small_lm(target, keep="importance")


def test_scores_are_mean_sizes(target: Target) -> None:
    """The FFN score of layer 0 is the sum of |SiLU(gate) * up| over all positions."""
    scores = activation_scores(target, TEXTS)
    assert scores.heads_LH.shape == (4, 4)
    layer = target.model.get_decoder().layers[0]
    seen = []
    layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for tokens in TEXTS:
        target.forward(tokens[None])
    expected = 0
    for x in seen:
        expected = expected + (F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)).abs()[0].sum(
            0
        )
    torch.testing.assert_close(scores.ffn_LF[0].float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cutting_to_the_full_width_is_the_identity(target: Target, family: str) -> None:
    if family == "gemma2":
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(Gemma2Config(**TINY))
        target = Target(model=model, tokenizer=tiny_tokenizer(), name="gemma2")
    drafter = wide(target, width=32)
    tokens_BT = TEXTS[0][None]
    features = target.forward(tokens_BT)
    torch.testing.assert_close(drafter.read(tokens_BT), features.final_BTd, rtol=1e-4, atol=1e-4)


def wide(target: Target, **settings: int) -> CausalLm:
    return small_lm(
        target, init="width", num_layers=None, embedding="own", head=OWN, calibration=TEXTS,
        **settings,
    )  # fmt: skip


def test_channels_that_carry_nothing_can_be_cut() -> None:
    """Dead FFN channels and dead heads: the narrower model is the same function."""
    target = tiny_target()  # its weights are changed here
    for layer in target.model.get_decoder().layers:
        layer.mlp.up_proj.weight.data[5:29] = 0.0
        # Heads 2 and 3 share the second key-value head.
        layer.self_attn.v_proj.weight.data[8:] = 0.0
    drafter = wide(target, intermediate_size=40, num_heads=2, num_kv_heads=1)
    assert drafter.inner.layers[0].mlp.up_proj.weight.shape == (40, 32)
    assert drafter.inner.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    tokens_BT = TEXTS[0][None]
    wanted = target.forward(tokens_BT).final_BTd
    torch.testing.assert_close(drafter.read(tokens_BT), wanted, rtol=1e-4, atol=1e-4)


def test_the_largest_are_kept_in_order(target: Target) -> None:
    """Residual channels 30, 3 and 8 score highest, heads 1 (of the first group) and 2."""
    channels_d, heads_H = torch.zeros(32), torch.tensor([0.1, 0.9, 0.8, 0.3])
    channels_d[[30, 3, 8]] = torch.tensor([3.0, 2.0, 1.0])
    scores = Scores(channels_d, torch.arange(64.0).expand(4, 64), heads_H.expand(4, 4))
    before = target.plain_config
    after = before | {"hidden_size": 3, "intermediate_size": 2, "num_attention_heads": 2}
    weights = cut(target_weights(target, [2]), scores, kept=[2], before=before, after=after)
    layer = target.model.get_decoder().layers[2]
    kept, rows = [3, 8, 30], [*range(8, 16), *range(16, 24)]
    expected = {
        "mlp.up_proj.weight": layer.mlp.up_proj.weight[[62, 63]][:, kept],
        "mlp.down_proj.weight": layer.mlp.down_proj.weight[kept][:, [62, 63]],
        "self_attn.q_proj.weight": layer.self_attn.q_proj.weight[rows][:, kept],
        "self_attn.k_proj.weight": layer.self_attn.k_proj.weight[:, kept],
        "self_attn.o_proj.weight": layer.self_attn.o_proj.weight[kept][:, rows],
        "input_layernorm.weight": layer.input_layernorm.weight[kept],
    }
    for name, weight in expected.items():
        assert torch.equal(weights.inner[f"layers.0.{name}"], weight), name
    assert torch.equal(weights.embedding_Vd, target.embedding_weight_Vd[:, kept])
    assert torch.equal(weights.head_Vd, target.head_weight_Vd[:, kept])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "none of drafter.width"),
        ({"width": 40}, "between 1 and the target's 32"),
        ({"num_heads": 4, "num_kv_heads": 1}, "more than the 2 queries"),
        ({"num_heads": 3, "num_kv_heads": 2}, "give a multiple"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    target: Target, settings: dict[str, int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        wide(target, **settings)
