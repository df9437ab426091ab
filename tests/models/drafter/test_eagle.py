"""EAGLE's own maths; the contract tests cover the rest."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from models.drafter.blocks import layer_config
from models.drafter.eagle import Eagle
from models.target import Features, Target

FROZEN = {"_target_": "models.head.frozen.FrozenHead"}


def _eagle(target: Target, **settings: Any) -> Eagle:
    torch.manual_seed(0)
    drafter = Eagle(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head=FROZEN,
        **settings,
    )
    drafter.bind(target).init_from(target)
    return drafter.eval()


def _text(target: Target, length: int = 12) -> tuple[Tensor, Features]:
    tokens_BT = torch.randint(3, target.vocab_size, (1, length))
    return tokens_BT, target.forward(tokens_BT)


def test_the_net_is_a_llama_layer_without_its_input_norm(target: Target) -> None:
    """f'_{t+1} = layer(C [E(x_{t+1}); f_t] + c) with transformers' own layer, logits = W f'."""
    drafter = _eagle(target)
    tokens_BT, features = _text(target)
    config = layer_config(hidden_size=target.hidden_size, **target.layer_shape)
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, layer_idx=0)
    layer.load_state_dict(drafter.layer.state_dict(), strict=False)
    layer.input_layernorm = torch.nn.Identity()  # type: ignore[assignment]
    both = torch.cat([target.embed(tokens_BT[:, 1:]), features.final_BTd[:, :-1]], dim=-1)
    z = both @ drafter.fc.weight.T + drafter.fc.bias
    T = z.shape[1]
    positions = torch.arange(T)[None]
    hidden = torch.full((T, T), float("-inf")).triu(1)[None, None]
    expected = layer(z, hidden, positions, position_embeddings=drafter.layer.rotary(z, positions))
    (depth,) = drafter.unroll(features, tokens_BT)
    assert depth.shift == 1
    assert depth.feature_BNd is not None
    torch.testing.assert_close(depth.states_BNd[:, :-1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(depth.feature_BNd, depth.states_BNd)
    torch.testing.assert_close(depth.head(expected), expected @ target.head_weight_Vd.T)


def test_the_second_draft_reads_the_predicted_feature_at_the_next_position(target: Target) -> None:
    """Depth 1 at t = depth 0 at t+1 of a text whose feature f_{t+1} is the prediction."""
    drafter = _eagle(target)
    tokens_BT, features = _text(target)
    first, second = drafter.unroll_to(features, tokens_BT, 2)
    t = 6
    assert first.feature_BNd is not None
    guessed_BTd = features.final_BTd.clone()
    guessed_BTd[:, t + 1] = first.feature_BNd[:, t]
    (expected,) = drafter.unroll(Features(guessed_BTd), tokens_BT)
    torch.testing.assert_close(
        second.states_BNd[0, t], expected.states_BNd[0, t + 1], rtol=1e-5, atol=1e-5
    )


def test_noise_is_uniform_and_only_in_training(target: Target) -> None:
    drafter = _eagle(target, noise=0.1)
    features = Features(torch.zeros(4, 256, target.hidden_size))
    assert not drafter.read(features).any()
    drafter.train()
    noise = drafter.read(features)
    assert float(noise.abs().max()) <= 0.1
    # A uniform variable in (-a, a) has mean 0 and variance a^2 / 3; 32,768 draws.
    assert abs(float(noise.mean())) < 4 * 0.1 / (3 * 32_768) ** 0.5
    assert abs(float(noise.var()) / (0.01 / 3) - 1) < 0.03
    drafter.noise_by_length = True  # 512 / 256 = 2
    assert 0.19 < float(drafter.read(features).abs().max()) <= 0.2
    torch.manual_seed(5)
    once = drafter.read(features)
    torch.manual_seed(5)
    assert torch.equal(once, drafter.read(features))  # drawn from the step's seed


def test_parameter_count_follows_the_paper(target: Target) -> None:
    """2d^2 + d (fc), 2d^2 + 2 d d_kv (attention), 3dF (MLP), d (norm); nothing of the target."""
    d, F_, d_kv = target.hidden_size, target.config.intermediate_size, 2 * 8
    expected = 2 * d * d + d + 2 * d * d + 2 * d * d_kv + 3 * d * F_ + d
    assert sum(p.numel() for p in _eagle(target).parameters()) == expected


def test_one_step_of_the_published_loss(target: Target) -> None:
    """1.0 SmoothL1(f', f_{t+1}) + 0.1 KL(p_{t+1} || q), as conf/experiment/eagle.yaml says it."""
    from hydra import compose, initialize_config_module

    from conf.check import build
    from train.chunked import chunked_loss, make_lesson
    from train.teacher import Teacher

    with initialize_config_module("conf", version_base=None):
        cfg = compose("train", overrides=["+experiment=eagle"])
    drafter = _eagle(target)
    tokens_BT, features = _text(target)
    learn_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    learn_BT[:, 5:9] = True
    teacher = Teacher(target=target)
    teacher.set_vocab(None)
    lesson = make_lesson(
        tokens_BT=tokens_BT,
        learn_BT=learn_BT,
        final_BTd=features.final_BTd,
        logz_BT=None,
        draft_ids_D=None,
        vocab_size=target.vocab_size,
    )
    depths = list(drafter.unroll(features, tokens_BT))
    sums = chunked_loss(
        depths=depths,
        lesson=lesson,
        loss=build(cfg.loss),
        projection=teacher,
        depth_decay=1.0,
        chunk_rows=3,
    )
    # Tokens 5..8 are drafted from t = 3..6, taught by f_4..f_7.
    states, taught = depths[0].states_BNd[0, 3:7], features.final_BTd[0, 4:8]
    logp, logq = (target.project(x).log_softmax(-1) for x in (taught, states))
    kl = (logp.exp() * (logp - logq)).sum(-1)
    expected = F.smooth_l1_loss(states, taught, reduction="none").mean(-1) + 0.1 * kl
    assert int(sums.count_K[0]) == 4
    torch.testing.assert_close(sums.total, expected.sum(), rtol=1e-4, atol=1e-4)
