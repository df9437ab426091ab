"""vLLM itself on EAGLE-3 (native and speculators), EAGLE and a draft model, each trained in
seconds: the text stays the target's, and as many drafts are accepted as our decoder accepts."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.process import free_port
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.greedy import Greedy
from export.base import Exporter
from export.engine.vllm import Vllm
from export.speculators import SpeculatorsExporter
from export.vllm import VllmExporter
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.eagle import Eagle
from models.drafter.eagle3 import Eagle3
from models.drafter.medusa import Medusa
from models.target import Target, resolve_name
from tests import needs
from tests.export import serve
from tests.export.quick import frequent, prompts, train
from tests.export.quick_gate import LENGTH, check_served

VLLM = Vllm()
OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
GAMMA = 3

pytestmark = [*needs.engine(VLLM), needs.packaged_target]


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


def tau(exporter: Exporter, drafter: Drafter, target: Target, folder: Path) -> float:
    """Tokens per step in the engine, judged against ours."""
    return check_served(VLLM, exporter, drafter, target, folder).engine_tau


@pytest.mark.parametrize("form", ["vllm", "speculators"])
def test_eagle3(small_target: Target, eagle3: Drafter, tmp_path: Path, form: str) -> None:
    both: dict[str, Exporter] = {
        "vllm": VllmExporter(gamma=GAMMA),
        "speculators": SpeculatorsExporter(gamma=GAMMA),
    }
    assert tau(both[form], eagle3, small_target, tmp_path) > 2.0


@pytest.mark.parametrize("form", ["vllm", "speculators"])
def test_the_serve_command_of_the_card_serves(
    small_target: Target, eagle3: Drafter, tmp_path: Path, form: str
) -> None:
    """As it stands in the model card, asked as clients ask; the server's own metrics say that the
    drafter was active, and by how much."""
    VLLM.install()
    name = resolve_name(small_target.name)
    both: dict[str, Exporter] = {
        "vllm": VllmExporter(gamma=GAMMA),
        "speculators": SpeculatorsExporter(gamma=GAMMA, verifier=name),
    }
    text = serve.command(both[form], eagle3, tmp_path / "draft", target=Path(name))
    port = free_port()
    here = f" --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager"
    small = " --max-model-len 256 --max-num-seqs 1 --no-enable-prefix-caching"
    variables = {k: v for k, v in VLLM.variables.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = tmp_path / "server.log"
    prompt = prompts(small_target)[0]
    with serve.server(text + here + small, VLLM, log, port, variables) as url:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            (model,) = [m["id"] for m in json.load(answer)["data"]]
        asked = {
            "model": model,
            "prompt": prompt.tokens,
            "max_tokens": LENGTH,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        made = serve.ask(f"{url}/v1/completions", asked)["choices"][0]["text"]
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
    decoder = Decoder(
        target=small_target, drafter=eagle3, verifier=Greedy(), policy=Chain(gamma=GAMMA)
    )
    ours = decoder.generate(prompt.tokens, max_new_tokens=LENGTH, stop_at_eos=False)
    assert made == small_target.tokenizer.decode(ours.tokens)
    counts = {
        word: float(value)
        for word, value in re.findall(
            r"^vllm:spec_decode_num_(\w+?)_total\{[^}]*\} (\S+)$", metrics, flags=re.MULTILINE
        )
    }
    assert counts["drafts"] == len(ours.rounds)
    assert counts["accepted_tokens"] == sum(r.accepted for r in ours.rounds) > 10


def test_eagle_with_its_bias(small_target: Target, texts: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    drafter = Eagle(**_sizes(small_target), noise=0.0, head=FROZEN)
    drafter.bind(small_target).init_from(small_target)
    with torch.no_grad():
        drafter.fc.bias.uniform_(-0.5, 0.5)  # far from what dropping it would leave
    train(drafter, small_target, texts, steps=60)
    exporter = VllmExporter(gamma=GAMMA)
    assert tau(exporter, drafter, small_target, tmp_path) > 1.5


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
    assert 1.3 < tau(VllmExporter(), drafter, small_target, tmp_path) < 3.0


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
    assert tau(exporter, drafter, small_target, tmp_path) > 1.5
