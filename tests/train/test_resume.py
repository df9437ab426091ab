"""Interrupt, resume, and compare with the run that was left alone: to the bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.drafter.load import drafter_class
from tests.train.conftest import Recipe
from train.loggers import RunCSV
from train.module import DraftModule
from train.preemption import Preempted
from train.resume import find_checkpoint, read_config

ROOT = Path(__file__).parents[2]
# Dropout, accumulation, several epochs, validation and checkpoints at different intervals.
SETTINGS = [
    "drafter.num_layers=2",
    "drafter.dropout=0.3",
    "drafter.prefix_layer=true",
    "trainer.max_steps=13",
    "trainer.epochs=null",
    "trainer.accumulate=2",
    "trainer.val_every_steps=4",
    "callbacks.checkpoints.every_steps=3",
    "data.tokens_per_batch=128",
    "final_decode=null",
]


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def stop(self: DraftModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.ends_step and self.trainer.global_step == step:
            raise Interrupted

    monkeypatch.setattr(DraftModule, "on_train_batch_end", stop)


def interrupted_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int, run_dir: Path, *settings: str
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        with pytest.raises(Interrupted):
            recipe.run(run_dir, *settings)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nobody interrupts."""
    return recipe.run(tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


def same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    for file in ("drafter/model.safetensors", "rank_accuracy.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


# 1: before the first checkpoint; 3: at one; 4: at a validation; 8 and 9: a checkpoint old; 13: end.
@pytest.mark.parametrize("step", [1, 3, 4, 5, 8, 9, 12, 13])
def test_resumed_is_the_same_run(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run_dir = tmp_path / "run"
    interrupted_run(recipe, monkeypatch, step, run_dir, *SETTINGS)
    torch.manual_seed(123)  # whatever the random state was
    recipe.run(tmp_path / "unused", f"resume={run_dir}")
    same_run(run_dir, whole)
    assert not (tmp_path / "unused").exists()


def test_interrupted_twice(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    interrupted_run(recipe, monkeypatch, 5, run_dir, *SETTINGS)
    interrupted_run(recipe, monkeypatch, 10, run_dir, f"resume={run_dir}")
    recipe.run(run_dir, f"resume={run_dir}")
    same_run(run_dir, whole)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    """Of a weight: torch.load reads it as if nothing had happened."""
    name, weight = next(iter(torch.load(path, weights_only=True)["state_dict"].items()))
    content = bytearray(path.read_bytes())
    content[content.index(weight.contiguous().numpy().tobytes()) + 2] ^= 0b100
    path.write_bytes(content)
    read = torch.load(path, weights_only=True)["state_dict"][name]
    assert int((read != weight).sum()) == 1


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
def test_a_corrupt_checkpoint_gives_way_to_the_one_before(
    recipe: Recipe,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    run_dir = tmp_path / "run"
    interrupted_run(recipe, monkeypatch, 10, run_dir, *SETTINGS)
    last = run_dir / "checkpoints" / "last.ckpt"
    assert find_checkpoint(run_dir).step == 9
    damage(last)
    (run_dir / "checkpoints" / "writing.ckpt").write_bytes(b"half of a newer one")
    point = find_checkpoint(run_dir)
    assert point.path is not None
    assert (point.path.name, point.step) == ("previous.ckpt", 8)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"Warning: the checkpoint \S*last\.ckpt cannot be read \(", said)
    assert ("checksum of" in said) == (damage is flip_a_bit)
    recipe.run(run_dir, f"resume={run_dir}")
    same_run(run_dir, whole)


def test_checkpoints_hold_no_target_and_no_pickled_objects(whole: Path) -> None:
    content = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(name.startswith("drafter.") for name in content["state_dict"])
    family, _ = drafter_class(whole / "checkpoints" / "best")
    assert family.__name__ == "HydraHeads"
    assert read_config(whole).trainer.max_steps == 13


def test_a_run_says_what_it_cost(whole: Path) -> None:
    """Time, what of it went into checkpoints (six of them), and the most memory."""
    results = json.loads((whole / "run.json").read_text())["results"]
    assert 0.0 < results["checkpoint_seconds"] < results["train_seconds"]
    assert 100e6 < results["peak_memory_bytes"] < 64e9


def test_resuming_what_is_no_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        recipe.run(tmp_path, f"resume={tmp_path / 'nothing'}")


def test_metrics_drop_later_and_broken_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,step\n1.0,1\n2.0,2\n3.0,3\n4.0")
    logger = RunCSV(run_dir=tmp_path, resume_step=2)
    logger.log_metrics({"a": 8.0}, step=2)
    logger.log_metrics({"a": 9.0}, step=3)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["a,step", "1.0,1", "2.0,2", "9.0,3"]


@pytest.mark.slow
def test_sigkill_at_random_points(recipe: Recipe, tmp_path: Path) -> None:
    """Real processes, killed without warning, twice, then left to finish."""
    settings = [*recipe.overrides, *SETTINGS, "trainer.max_steps=40"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "train", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    reference, run_dir = tmp_path / "reference", tmp_path / "killed"
    assert start(*settings, f"hydra.run.dir={reference}").wait(300) == 0
    process = start(*settings, f"hydra.run.dir={run_dir}")
    rng = random.Random(os.getpid())
    rows = run_dir / "metrics.csv"
    for _ in range(2):
        enough = rng.randint(5, 60)
        while process.poll() is None:
            if rows.exists() and rows.read_bytes().count(b"\n") >= enough:
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.001)
        process = start(f"resume={run_dir}")
    assert process.wait(300) == 0
    same_run(run_dir, reference)


def test_the_end_of_a_slurm_job_stops_a_run_before_it(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`margin_seconds` before it: checkpoint, stop, and go on where there is time again."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 120))
    with pytest.raises(Preempted) as stopped:
        recipe.run(run_dir, *SETTINGS, "callbacks.preemption.margin_seconds=300")
    assert (stopped.value.cause, stopped.value.step, stopped.value.queued) == (
        "time limit", 1, False,
    )  # fmt: skip
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    assert find_checkpoint(run_dir).step == 1
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 3600))
    recipe.run(run_dir, f"resume={run_dir}")
    same_run(run_dir, whole)
