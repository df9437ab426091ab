"""A published folder becomes a run that decode measures and training starts from."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from conf.check import schema
from decode.__main__ import decode
from export.vllm import VllmExporter
from models.run import open_run
from models.target import Target
from scripts.import_drafter import fetch, import_drafter, train_command
from tests.export.formats.drafters import eagle3
from train.run import make_drafter, start_from


def run(command: str, function, *overrides: str):
    assert schema  # registers the commands' root keys
    with initialize_config_module("conf", version_base=None):
        return function(compose(command, overrides=list(overrides)))


@pytest.fixture
def checkpoint(target: Target, tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    drafter = eagle3(target, norm_output=True, feature_layers=[1, 2, 3])
    VllmExporter().write(drafter, folder)
    return folder


def test_import_measure_and_train(
    target: Target, target_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "imported"
    common = (f"target.name={target_dir}", f"dataset.root={tmp_path}")
    got = run("import_drafter", import_drafter, f"checkpoint={checkpoint}", f"out={out}", *common)
    assert got == out
    facts = json.loads((out / "run.json").read_text())
    assert facts["imported"] == {"checkpoint": str(checkpoint), "format": "eagle3"}
    drafter = open_run(out).load_drafter(target)
    assert drafter.draft_vocab_size == 40

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat sat"}\n{"prompt": "what is two plus two"}\n')
    status = run(
        "decode",
        decode,
        f"run={out}",
        "bench=file",
        "bench.name=mine",
        f"bench.sources.0.path={prompts}",
        "max_new_tokens=8",
        "tree.gamma=3",
        "lossless=true",
        "dtype=float32",
    )
    assert status == 0
    measured = json.loads((out / "decode" / "mine-chain3-T0" / "results.json").read_text())
    assert measured["prompts"] == 2

    command = train_command(drafter, target, out).split()
    assert command[:4] == ["python", "-m", "train", f"start={out}"]
    overrides = [part.strip("'") for part in command[4:]]
    assert "drafter.norm_output=true" in overrides
    again = run("train", lambda cfg: make_drafter(cfg.drafter, target), *overrides, *common)
    start_from(again, out / "drafter", target)
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_nothing_is_overwritten(checkpoint: Path, target_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        run(
            "import_drafter",
            import_drafter,
            f"checkpoint={checkpoint}",
            f"out={tmp_path}",
            f"target.name={target_dir}",
        )


def test_a_hub_id_is_fetched_and_a_folder_is_not(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr("scripts.import_drafter.snapshot_download", download)
    assert fetch(str(checkpoint)) == checkpoint
    assert fetch("./nowhere/here") == Path("nowhere/here")
    assert asked == []
    assert fetch("owner/drafter") == checkpoint
    name, patterns = asked[0]
    assert name == "owner/drafter"
    assert not any(p.endswith(".py") for p in patterns)
