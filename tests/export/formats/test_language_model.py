"""A small language model for engines that draft with one."""

from pathlib import Path
from typing import Any

import pytest

from export.check import check_export
from export.formats.base import FormatExporter
from export.sglang import SglangExporter
from export.tensorrt_llm import TensorrtLlmExporter
from export.vllm import VllmExporter
from models.drafter.causal_lm import CausalLm
from models.target import Target
from tests.export.formats.drafters import FROZEN, eagle3, medusa, proven


@pytest.mark.parametrize(
    ("exporter", "word"),
    [
        (VllmExporter(gamma=4), '"method": "draft_model"'),
        (SglangExporter(gamma=4), "--speculative-algorithm STANDALONE"),
        (TensorrtLlmExporter(gamma=4), "DraftTargetDecodingConfig(max_draft_len=4"),
    ],
    ids=["vllm", "sglang", "tensorrt_llm"],
)
def test_draft_models(target: Target, tmp_path: Path, exporter: FormatExporter, word: str) -> None:
    drafter: Any = CausalLm(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_config=target.plain_config,
        num_layers=2,
        head=FROZEN,
    ).bind(target)
    drafter.init_from(target)
    assert proven(exporter, drafter.eval(), target, tmp_path).tokens == (6 + 16) * 8
    assert check_export(tmp_path) == "assistant"
    assert word in exporter.usage(target="owner/model", depths=1)
    assert (exporter.writes_text, exporter.library) == (True, "transformers")


@pytest.mark.parametrize(
    ("exporter", "make", "words"),
    [
        (VllmExporter(gamma=5), eagle3, ['"method": "eagle3"', '"num_speculative_tokens": 5']),
        (VllmExporter(gamma=5), medusa, ['"method": "medusa"', '"num_speculative_tokens": 3']),
        (SglangExporter(gamma=5), eagle3, ["EAGLE3", "--speculative-num-draft-tokens 6"]),
        (TensorrtLlmExporter(), eagle3, ["eagle3_layers_to_capture={0, 1, 2}"]),
        (TensorrtLlmExporter(), medusa, ["MedusaDecodingConfig(num_medusa_heads=3"]),
    ],
)
def test_the_serve_command_fits_the_folder(
    target: Target, tmp_path: Path, exporter: FormatExporter, make: Any, words: list[str]
) -> None:
    drafter = make(target)
    exporter.write(drafter, tmp_path)
    card = exporter.usage(target="owner/model", depths=drafter.num_depths)
    for word in [*words, "owner/model", "path/to/this/folder"]:
        assert word in card
    assert not exporter.writes_text
