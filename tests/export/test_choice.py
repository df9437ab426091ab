"""Every exporter is asked, by its own refusal, who can write a drafter."""

from pathlib import Path
from typing import Any

import pytest

from export.choice import able, all_exporters, refuse
from export.vllm import VllmExporter
from models.target import Target
from tests.export.formats.drafters import OWN, eagle, eagle3
from tests.export.test_formats import hydra_heads, medusa

ROOT = Path(__file__).parents[2]


def test_one_yaml_one_module_one_exporter() -> None:
    named = {e.name for e in all_exporters()}
    assert named == {f.stem for f in (ROOT / "conf" / "exporter").glob("*.yaml")}
    for exporter in all_exporters():
        assert type(exporter).__module__ == f"export.{exporter.name}"


def test_who_can_write_what(target: Target) -> None:
    everywhere: dict[str, Any] = {
        "medusa": medusa(target, head=OWN),
        "eagle3": eagle3(target),
        "eagle": eagle(target),
        "own": eagle(target, head=OWN),
    }
    found = {name: set(able(drafter)) for name, drafter in everywhere.items()}
    assert {"hf", "vllm", "tgi"} <= found["medusa"]
    assert {"hf", "vllm", "sglang", "tensorrt_llm", "gguf"} <= found["eagle3"]
    assert {"hf", "vllm", "sglang"} <= found["eagle"]
    # a head of its own has no place beside the target's
    assert "hf" in found["own"]
    assert not {"vllm", "sglang", "assistant", "gguf"} & found["own"]


def test_a_refusal_names_those_that_can(target: Target) -> None:
    with pytest.raises(ValueError, match=r"vLLM cannot serve HydraHeads.*can be written with.*=hf"):
        refuse(VllmExporter(), hydra_heads(target))
