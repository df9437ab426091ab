"""The drafter that tells layers apart does, in our own model; engines are given it elsewhere."""

import pytest
import torch
from torch import Tensor

from models.target import Target
from tests import needs
from tests.export.layer_probe import LAYERS, layer_probe

pytestmark = [needs.packaged_target, pytest.mark.slow]


def test_only_the_right_layers_draft_the_text(small_target: Target, texts: list[Tensor]) -> None:
    probe = layer_probe(small_target, texts, LAYERS)
    around = tuple(k + step for k in LAYERS for step in (-1, 0, 1))
    seen = [small_target.forward(text[None], layers=around) for text in texts]

    def right(layers: list[int]) -> float:
        """Share of positions whose first draft is the text's token."""
        probe.feature_layers = tuple(layers)
        drafts = []
        for features, text in zip(seen, texts, strict=True):
            depth = next(iter(probe.unroll(features, text[None])))
            best = depth.head(depth.states_BNd[0, : len(text) - 2]).argmax(-1)
            drafts.append(probe.to_target_ids(best) == text[2:])
        return float(torch.cat(drafts).float().mean())

    with torch.inference_mode():
        assert right(LAYERS) == 1.0
        for place in range(3):
            for step in (-1, 1):
                others = list(LAYERS)
                others[place] += step
                assert right(others) == 0.0
