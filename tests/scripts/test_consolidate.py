"""A checkpoint of an unfinished run as a drafter folder: its own weights, or a sentence why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.check import build
from models.drafter.load import load_drafter
from models.target import Target
from scripts.consolidate import consolidate
from tests.train.conftest import Recipe
from tests.train.conftest import recipe as recipe
from tests.train.test_resume import interrupted_run
from train.resume import read_config

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "trainer.max_steps=9",
    "trainer.epochs=null",
    "trainer.val_every_steps=9",
    "callbacks.checkpoints.every_steps=2",
    "callbacks.checkpoints.keep_every_steps=2",
    "callbacks.checkpoints.keep_limit=2",
    "data.tokens_per_batch=128",
    "final_decode=null",
]


def unfinished(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, run: Path, *given: str, step: int = 7
) -> Path:
    interrupted_run(recipe, monkeypatch, step, run, *given, *SETTINGS)
    assert not (run / "drafter").exists()
    return run


def target_of(run: Path) -> Target:
    return build(read_config(run).target)


def assert_holds(folder: Path, checkpoint: Path, run: Path) -> None:
    """The drafter in a folder has a checkpoint's weights, and drafts."""
    target = target_of(run)
    drafter = load_drafter(folder, target)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    ours = drafter.state_dict()
    assert {f"drafter.{name}" for name in ours} == {n for n in state if n.startswith("drafter.")}
    for name, value in ours.items():
        assert torch.equal(value, state[f"drafter.{name}"]), name
    tokens_1T = torch.arange(5)[None]
    features = target.forward(tokens_1T, layers=drafter.feature_layers)
    assert next(iter(drafter.unroll(features, tokens_1T))).states_BNd.shape[:2] == (1, 5)


def test_the_newest_a_named_one_and_what_is_damaged(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = unfinished(recipe, monkeypatch, tmp_path / "run")
    kept = sorted(p.name for p in (run / "checkpoints").glob("step-*.ckpt"))
    assert kept == ["step-00000004.ckpt", "step-00000006.ckpt"]
    newest = consolidate(run, None, None)
    assert newest == run / "consolidated-00000006"
    assert_holds(newest, run / "checkpoints" / "last.ckpt", run)
    earlier = consolidate(run, f"checkpoints/{kept[0]}", str(tmp_path / "fourth"))
    assert_holds(earlier, run / "checkpoints" / kept[0], run)
    with pytest.raises(ValueError, match="is there already and is not written over"):
        consolidate(run, None, None)
    # last.ckpt shares its bytes with step-00000006.ckpt until it moves on.
    for name in ("last.ckpt", kept[1]):
        file = run / "checkpoints" / name
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-700])
    with pytest.raises(ValueError, match=r"step-00000006\.ckpt is not whole"):
        consolidate(run, f"checkpoints/{kept[1]}", str(tmp_path / "sixth"))
    assert not (tmp_path / "sixth").exists()
    capsys.readouterr()
    assert consolidate(run, None, None) == run / "consolidated-00000004"
    assert "Warning: the checkpoint" in capsys.readouterr().err
    for file in (run / "checkpoints").glob("*.ckpt"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="There is no checkpoint that can be read"):
        consolidate(run, None, None)


def test_behind_the_last_step_it_is_what_the_run_saved(recipe: Recipe, tmp_path: Path) -> None:
    """With parts that a drafter gets after it was made (adapters), or that lie beside it (a head
    that says what is accepted, which the run calibrates on top)."""
    lm = ["+experiment=small_lm", *SETTINGS, "trainer.max_steps=2"]
    adapted = recipe.run(tmp_path / "a", *lm, "drafter.lora={r:4,alpha:8}")
    judging = ["+experiment=specdec_pp", f"start={adapted}", "acceptance.temperature=0"]
    judged = recipe.run(tmp_path / "b", *judging, "acceptance.stride=9", *lm[1:])
    for run, names in ((adapted, ["model"]), (judged, ["model", "acceptance"])):
        folder = consolidate(run, None, None)
        for name in names:
            made, saved = (d / f"{name}.safetensors" for d in (folder, run / "drafter"))
            assert made.read_bytes() == saved.read_bytes(), made
    assert load_drafter(folder, target_of(judged)).acceptance is not None


@pytest.mark.slow
def test_the_command(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = unfinished(recipe, monkeypatch, tmp_path / "run")
    command = [sys.executable, "-m", "scripts.consolidate", f"run={run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    done, again = (
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        for _ in range(2)
    )
    assert done.returncode == 0, done.stderr
    assert f"The drafter after step 6 of {run} is in {run}/consolidated-00000006." in done.stderr
    assert_holds(run / "consolidated-00000006", run / "checkpoints" / "last.ckpt", run)
    assert again.returncode == 2
    assert "is there already and is not written over" in again.stderr
    assert "Traceback" not in again.stderr
