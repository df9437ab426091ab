"""OpenVINO GenAI itself on drafters trained in seconds.

By hand, because it takes 1.6 GB: `python -m export install=openvino`.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from data_prep.prompts import Prompt
from export.engine.openvino import Openvino
from export.gate import follow
from export.hf import DrafterReader
from export.openvino import OpenvinoExporter
from export.parity import prove_equal
from models.drafter.base import Drafter
from models.target import Target, resolve_name
from tests import needs
from tests.export import serve
from tests.export.layer_probe import LAYERS, layer_probe
from tests.export.quick import answers
from tests.export.quick_gate import check_served, quick

OPENVINO = Openvino()

pytestmark = [*needs.engine(OPENVINO), needs.packaged_target]


@pytest.mark.parametrize("family", ["eagle3", "causal_lm"])
def test_the_engine_drafts_and_accepts_what_ours_does(
    small_target: Target, texts: list[Tensor], tmp_path: Path, family: str
) -> None:
    drafter: Drafter = quick(family, small_target, texts)
    exporter = OpenvinoExporter(gamma=3)
    check_served(OPENVINO, exporter, drafter, small_target, tmp_path)
    # The IR, asked for chains at many positions, drafts what the drafter drafts.
    proof = prove_equal(
        trained=DrafterReader(drafter),
        exported=exporter.read(tmp_path, small_target),
        drafter=drafter,
        target=small_target,
        texts=texts[-1:],
    )
    assert proof.tokens == 16 * 8


def test_the_engine_reads_the_layers_it_names(
    small_target: Target, texts: list[Tensor], tmp_path: Path
) -> None:
    probe = layer_probe(small_target, texts, LAYERS)
    served = check_served(OPENVINO, OpenvinoExporter(gamma=1), probe, small_target, tmp_path)
    assert served.engine_tau > 1.9  # 1 with any other layer: test_layer_probe.py


def test_the_commands_of_the_card_serve(
    small_target: Target, texts: list[Tensor], tmp_path: Path
) -> None:
    """The conversion of the target and the script, as they stand in the model card. The engine puts
    the question into the chat template; its defaults (bf16, compressed cache) may flip a near-tie,
    so its text is not held against ours and its count is allowed to differ a little."""
    asked = [{"role": "user", "content": "The capital of France is"}]
    tokenizer = small_target.tokenizer
    templated: Any = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    prompt = Prompt("card", templated["input_ids"], "")
    (answer,) = answers(small_target, [prompt], 64)
    drafter = quick("eagle3", small_target, [answer, *texts])
    folder = Path(resolve_name(small_target.name))
    text = serve.command(OpenvinoExporter(gamma=3), drafter, tmp_path / "draft", target=folder)
    printed = serve.run(text, OPENVINO, tmp_path / "log.txt", OPENVINO.variables)
    made = re.search(r"^accepted drafts: (\d+)\n(.*)\n\Z", printed, re.DOTALL | re.MULTILINE)
    assert made is not None, printed
    tokens = tokenizer(made[2])["input_ids"]
    assert len(tokens) > 20
    rounds = follow(drafter, small_target, prompt, tokens, gamma=3).rounds
    accepted = sum(rounds) - len(rounds)
    assert abs(int(made[1]) - accepted) <= 4 < accepted / 2
