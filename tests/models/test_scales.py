"""First weights that do not depend on how large a target's features are.

Shape legend: B sequences, T positions, d hidden size.
"""

import copy
from typing import Any

import pytest
import torch

from models.drafter.eagle import Eagle
from models.drafter.eagle3 import Eagle3
from models.scales import logit_spread, typical_sizes
from models.target import Target
from tests.tiny import tiny_target


def _texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (n,), generator=generator) for n in (30, 41, 17)]


def test_sizes_are_the_median_positions(target: Target) -> None:
    """Over 12 positions of one text, with a first position 100 times as large, by hand."""
    tokens = torch.arange(10, 22)
    features = target.forward(tokens[None], layers=(2,))
    found = typical_sizes(target, [tokens], (2,))
    stream = features.layers[2][0]
    expected = sorted((x.square().sum() / 32) ** 0.5 for x in stream)
    # torch.median takes the lower of the two in the middle.
    assert found.layers[2] == pytest.approx(float(expected[5]), rel=1e-4)
    assert found.final == pytest.approx(
        float((features.final_BTd[0].square().sum(-1) / 32).sqrt().median()), rel=1e-4
    )
    assert found.embedding > 0


def test_spread_of_logits_is_what_random_states_show(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4000, 32, generator=generator)
    scale = torch.linspace(0.1, 2.0, 32)
    ids = torch.arange(0, 300, 3)
    logits = (states * scale) @ target.head_weight_Vd[ids].T
    assert logit_spread(target, ids, scale) == pytest.approx(float(logits.std()), rel=0.02)


@pytest.mark.parametrize("family", [Eagle, Eagle3])
def test_the_first_logits_are_soft_and_every_input_counts(target: Target, family: Any) -> None:
    """On a target with large streams and a large head, and on the same one as it is."""
    large = tiny_target()
    model = copy.deepcopy(large.model)
    with torch.no_grad():
        model.model.norm.weight *= 20.0
        model.model.embed_tokens.weight *= 0.05
    for one in (target, Target(model=model, tokenizer=large.tokenizer, name="large")):
        torch.manual_seed(0)
        own = family is Eagle3
        drafter = family(
            hidden_size=32,
            vocab_size=one.vocab_size,
            target_shape=one.layer_shape,
            head={"_target_": f"models.head.{'own.OwnHead' if own else 'frozen.FrozenHead'}"},
        )
        drafter.bind(one).init_from(one, _texts())
        drafter.eval()
        tokens_BT = _texts()[0][None]
        features = one.forward(tokens_BT, layers=drafter.feature_layers)
        (depth, *_) = drafter.unroll(features, tokens_BT)
        logits = depth.head(depth.states_BNd)
        assert 0.3 < float(logits.detach().std()) < 2.0
        weight = drafter.fc.weight.detach()
        if own:
            inputs = [features.layers[k][0] for k in drafter.feature_layers]
        else:
            inputs = [one.embed(tokens_BT)[0], features.final_BTd[0]]
        parts = [
            float((x[1:] @ w.T).square().mean().sqrt())
            for x, w in zip(inputs, weight.split(32, dim=1), strict=True)
        ]
        assert max(parts) < 2 * min(parts)
