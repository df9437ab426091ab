"""Uploads against a real server on this machine that speaks the Hub's API."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from models.drafter.medusa import Medusa
from models.run import open_run
from models.target import Target
from scripts.upload import Upload
from scripts.upload_card import Licences
from tests.export.tiny_run import write_run
from tests.scripts.hub import Hub

ROOT = Path(__file__).parents[2]
HEAD = {"_target_": "models.head.own.OwnHead"}
REPO = "someone/draft"


@pytest.fixture
def run(target: Target, target_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    torch.manual_seed(0)
    drafter = Medusa(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, num_heads=2, head=HEAD
    )
    node = {"_target_": "models.drafter.medusa.Medusa", "num_heads": 2, "head": HEAD}
    write_run(folder, drafter=drafter, node=node, target=target, target_dir=target_dir)
    facts = json.loads((folder / "run.json").read_text())
    facts["drafter"] = {"class": "Medusa", "depths": 2, "parameters": 12345}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.csv").write_text("train/loss,step\n1.5,1\n")
    return folder


def job(run: Path, **settings: bool) -> Upload:
    opened = open_run(run)
    licences = Licences("apache-2.0", "Apache-2.0", "MIT")
    return Upload(opened, REPO, opened.drafter_folder, licences, **settings)


@pytest.mark.slow
def test_interrupted_upload_goes_on_and_comes_back(run: Path, tmp_path: Path) -> None:
    """Dry run, an upload whose commit fails, the same command again, a third time; download."""
    licences = {"license": "apache-2.0", "target_license": "Apache-2.0", "data_license": "MIT"}
    settings = {"run": str(run), "repo": REPO} | licences
    with Hub() as hub:
        hub.failing_commits = 1
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_" + "t" * 34,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "*",
        }
        command = [sys.executable, "-m", "tests.scripts.upload_driver", json.dumps(settings)]
        done = subprocess.run(
            [*command, str(tmp_path / "cache")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["interrupted"] == "400"
    assert lines["commit"].endswith(f"{REPO}/commit/{hub.sha(REPO)}")
    assert hub.commits[REPO] == 1  # the third time there was nothing to commit
    assert hub.private[REPO]
    puts = [path for method, path in hub.requests if method == "PUT"]
    assert len(puts) == len(set(puts)) == 1  # weights were sent once
    files = hub.repos[REPO]
    assert set(files) == {"README.md", "config.json", "metrics.csv", "model.safetensors"}
    assert files["model.safetensors"] == (run / "drafter" / "model.safetensors").read_bytes()
    here = Path(lines["downloaded"])
    ours, theirs = (load_file(f / "model.safetensors") for f in (here, run / "drafter"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    card = (here / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    for line in ("| the prompts, dataset `words` | MIT |", "12,345"):
        assert line in card
    assert str(run) not in card
    # Where large files are stored the token is not shown.
    assert hub.tokens - {None} == {"Bearer hf_" + "t" * 34}
    assert not (run / "upload").exists()
    # Nothing was changed there before the first real try.
    writes = [request for request in hub.requests if request[0] != "GET"]
    assert writes[0] == ("POST", "/api/repos/create")


def test_nothing_goes_that_must_not(run: Path, target: Target) -> None:
    drafter = run / "drafter"
    (drafter / "notes.txt").write_text("token: hf_" + "a" * 34)
    (drafter / "tokens-00000.parquet").write_bytes(b"PAR1")
    (drafter / "respond.jsonl").write_text("{}")
    weights = load_file(drafter / "model.safetensors")
    head = next(name for name, w in weights.items() if w.shape == target.head_weight_Vd.shape)
    weights[head] = target.head_weight_Vd.clone()
    save_file(weights, drafter / "model.safetensors")
    with pytest.raises(ValueError, match="Nothing is uploaded") as refused:
        job(run).stage()
    said = str(refused.value)
    for problem in (
        "notes.txt: holds a Hub token",
        "tokens-00000.parquet: training data",
        "respond.jsonl: training data",
        f"its tensor '{head}' is the target's",
    ):
        assert problem in said
    assert not (run / "upload").exists()
    for file in ("notes.txt", "tokens-00000.parquet", "respond.jsonl"):
        (drafter / file).unlink()
    assert job(run, target_weights=True).stage().is_dir()
