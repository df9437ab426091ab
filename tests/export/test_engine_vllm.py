"""vLLM itself on exported Medusa heads (`python -m export install=vllm` first)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.engine.vllm import Vllm
from export.formats.medusa import MedusaCheckpoint
from export.vllm import VllmExporter
from models.drafter.eagle3 import Eagle3
from models.drafter.medusa import Medusa
from models.target import Features, Target, resolve_name
from tests import needs

VLLM = Vllm()
OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}

pytestmark = [*needs.engine(VLLM), needs.packaged_target]


def generate(folder: str, export: Path | None, out: Path) -> list[list[int]]:
    driver = Path(__file__).with_name("vllm_driver.py")
    done = subprocess.run(
        [VLLM.python, driver, folder, export or "none", "2", out],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain(small_target: Target, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    folder = tmp_path_factory.mktemp("plain")
    return generate(resolve_name(small_target.name), None, folder / "none.safetensors")


@pytest.mark.parametrize(("head", "size"), [(OWN, 300), (FROZEN, 300)], ids=["widened", "shared"])
def test_the_engine_drafts_what_the_drafter_drafts(
    small_target: Target,
    plain: list[list[int]],
    tmp_path: Path,
    head: dict[str, Any],
    size: int | None,
) -> None:
    torch.manual_seed(0)
    drafter = Medusa(
        hidden_size=small_target.hidden_size,
        vocab_size=small_target.vocab_size,
        num_heads=2,
        draft_vocab_size=size,
        head=head,
    )
    if size is not None:
        drafter.set_vocab(torch.randperm(small_target.vocab_size)[:size])
    drafter.bind(small_target).init_from(small_target)
    with torch.no_grad():
        for block in drafter.blocks:
            for p in block.parameters():
                p.normal_(std=0.05)
    export = tmp_path / "checkpoint"
    export.mkdir()
    VllmExporter().write(drafter, export)
    out = tmp_path / "drafts.safetensors"
    assert generate(resolve_name(small_target.name), export, out) == plain
    seen = load_file(out)
    reader = MedusaCheckpoint(export, torch.device("cpu"))
    tokens = torch.zeros(1, 1, dtype=torch.long)
    ours = [reader.draft(Features(h[None, None]), tokens) for h in seen["hidden_Nd"]]
    assert len(ours) > 20
    assert ours == seen["drafts_NK"].tolist()
    # and the engine's drafts are the drafter's own, from its training view
    with torch.inference_mode():
        for k, depth in enumerate(drafter.unroll(Features(seen["hidden_Nd"][None]), tokens)):
            drafts = drafter.to_target_ids(depth.head(depth.states_BNd[0]).argmax(-1))
            assert drafts.tolist() == seen["drafts_NK"][:, k].tolist()


def test_the_engine_feeds_eagle3_the_layers_it_was_trained_on(
    small_target: Target, tmp_path: Path
) -> None:
    """Acceptance does not tell: neighbouring layers are too alike for a layer id off by one to show
    there. Three of them that stand in no regular distance are compared number by number."""
    layers = [3, 14, 26]
    drafter = Eagle3(
        hidden_size=small_target.hidden_size,
        vocab_size=small_target.vocab_size,
        target_shape=small_target.layer_shape,
        feature_layers=layers,
        draft_vocab_size=300,
        head=OWN,
    )
    drafter.set_vocab(torch.arange(300))
    drafter.bind(small_target).init_from(small_target)
    export = tmp_path / "checkpoint"
    export.mkdir()
    VllmExporter().write(drafter, export)
    prompt = small_target.tokenizer.encode("The capital of France is Paris, and that of")
    folder = Path(resolve_name(small_target.name))
    asked = VLLM.prepare(folder, export, tmp_path, "float32")
    (tmp_path / "request.json").write_text(json.dumps({**asked, "gamma": 2, "prompts": [prompt]}))
    done = subprocess.run(
        [
            VLLM.python,
            Path(__file__).with_name("vllm_features.py"),
            tmp_path / "request.json",
            tmp_path / "seen.safetensors",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=tmp_path,
        env={**os.environ, **VLLM.variables},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen_Td = load_file(tmp_path / "seen.safetensors")["features"]
    with torch.inference_mode():
        every = small_target.forward(torch.tensor([prompt]), layers=tuple(range(1, 30)))
    size = small_target.hidden_size
    for place, layer in enumerate(layers):
        given_Td = seen_Td[:, place * size : (place + 1) * size]
        # How far it is from the state after each number of layers.
        far = {i: float((given_Td - every.layers[i][0]).abs().mean()) for i in range(1, 30)}
        assert min(far, key=lambda i: far[i]) == layer
        assert far[layer] < 1e-3 < 0.05 < min(far[layer - 1], far[layer + 1])
