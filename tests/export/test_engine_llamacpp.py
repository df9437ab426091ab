"""llama.cpp itself on GGUF drafters trained in seconds (`python -m export install=llamacpp`)."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import GGUFReader
from torch import Tensor

from data_prep.process import free_port
from export.engine.llamacpp import Llamacpp, target_gguf
from export.formats.gguf import FILE
from export.gate import follow
from export.gguf import GgufExporter
from models.drafter.base import Drafter
from models.target import Target, resolve_name
from tests import needs
from tests.export import serve
from tests.export.layer_probe import LAYERS, layer_probe
from tests.export.quick import prompts
from tests.export.quick_gate import LENGTH, check_served, quick, served_by
from tests.export.test_gguf import rewrite

LLAMACPP = Llamacpp()
GAMMA = 3

pytestmark = [*needs.engine(LLAMACPP), needs.packaged_target]


@pytest.fixture(scope="module")
def eagle3(small_target: Target, texts: list[Tensor]) -> Drafter:
    return quick("eagle3", small_target, texts)


def test_eagle3(small_target: Target, eagle3: Drafter, tmp_path: Path) -> None:
    check_served(LLAMACPP, GgufExporter(gamma=GAMMA), eagle3, small_target, tmp_path)


def test_draft_model(small_target: Target, texts: list[Tensor], tmp_path: Path) -> None:
    drafter = quick("causal_lm", small_target, texts)
    check_served(LLAMACPP, GgufExporter(gamma=GAMMA), drafter, small_target, tmp_path)


def test_the_serve_command_of_the_card_serves(
    small_target: Target, eagle3: Drafter, tmp_path: Path
) -> None:
    """As it stands in the model card, asked over HTTP; the timings of the answer say how many
    drafts were accepted."""
    folder = Path(resolve_name(small_target.name))
    exporter = GgufExporter(gamma=GAMMA, target_gguf=str(target_gguf(folder, "float32")))
    text = serve.command(exporter, eagle3, tmp_path / "draft", target=folder)
    port = free_port()
    text = text.replace("p.port = 8080", f"p.port = {port}")
    prompt = prompts(small_target)[0]
    asked = {
        "prompt": prompt.tokens,
        "n_predict": LENGTH,
        "temperature": 0,
        "return_tokens": True,
    }
    with serve.server(text, LLAMACPP, tmp_path / "server.log", port) as url:
        made = serve.ask(f"{url}/completion", asked)
    assert made["tokens"] == serve.alone(small_target, prompt.tokens, LENGTH, ends=True)
    rounds = follow(eagle3, small_target, prompt, made["tokens"], gamma=GAMMA).rounds
    assert made["timings"]["draft_n_accepted"] == sum(rounds) - len(rounds) > 10


def test_the_engine_reads_the_layers_it_names(
    small_target: Target, texts: list[Tensor], tmp_path: Path
) -> None:
    probe = layer_probe(small_target, texts, LAYERS)
    served = check_served(LLAMACPP, GgufExporter(gamma=1), probe, small_target, tmp_path)
    assert served.engine_tau > 1.9  # 1 with any other layer: test_layer_probe.py


class OffByOne(GgufExporter):
    """Every drafted token is the next one: the validator cannot tell."""

    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        super().write(drafter, folder, texts=texts)
        ids = next(t.data for t in GGUFReader(folder / FILE).tensors if t.name == "d2t")
        rewrite(folder / FILE, d2t=ids + 1)


def test_the_gate_sees_what_the_engine_is_silent_about(
    small_target: Target, eagle3: Drafter, tmp_path: Path
) -> None:
    served = served_by(LLAMACPP, OffByOne(gamma=GAMMA), eagle3, small_target, tmp_path)
    assert served.own_texts == len(served.records)
    with pytest.raises(ValueError, match="more than 2% apart"):
        served.insist()
