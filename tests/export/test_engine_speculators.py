"""The speculators library as an independent reader: its logits are ours
(`python -m export install=speculators` first)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import export.engine
from export.engine.process import call_driver
from export.engine.speculators import Speculators
from export.speculators import SpeculatorsExporter
from models.target import Target
from tests.export.formats.drafters import eagle3, texts

LIBRARY = Speculators()
DRIVER = Path(export.engine.__file__).parent / "drivers" / "speculators_driver.py"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not LIBRARY.is_installed(), reason="python -m export install=speculators"),
]


@pytest.mark.parametrize(
    "settings",
    [{"norm_before_residual": True, "norm_output": True}, {"draft_vocab_size": None}],
    ids=["normed-residual", "whole"],
)
def test_logits_are_ours(
    target: Target, target_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    drafter = eagle3(target, **settings)
    folder = tmp_path / "export"
    folder.mkdir()
    SpeculatorsExporter(verifier=str(target_dir)).write(drafter, folder)
    tokens_T = texts(target)[1]
    features = target.forward(tokens_T[None], layers=drafter.feature_layers)
    joined = torch.cat([features.layers[k][0, :-1] for k in (1, 2, 3)], dim=-1)
    seen, logits = tmp_path / "seen.safetensors", tmp_path / "logits.safetensors"
    save_file({"features_Te": joined.contiguous(), "tokens_T": tokens_T[1:].contiguous()}, seen)
    answer = call_driver(
        LIBRARY.python,
        DRIVER,
        {"draft": str(folder), "seen": str(seen), "logits": str(logits)},
        environment={"HF_HUB_OFFLINE": "1"},
        timeout_s=300.0,
    )
    assert answer["versions"]["speculators"] == LIBRARY.version
    with torch.inference_mode():
        depth = next(iter(drafter.unroll(features, tokens_T[None])))
        want_TD = depth.head(depth.states_BNd[0, :-1])
    got_TD = load_file(logits)["logits_TD"]
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-4, atol=1e-4)
