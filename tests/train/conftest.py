"""A dataset of the tiny target, and the command line that trains on it."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

import conf.resolvers  # noqa: F401  (conf/train.yaml uses them)
from train.run import train as train_run

ROOT = Path(__file__).parents[2]
WORDS = ("the cat sat", "on the mat", "and a dog", "ran to", "what is two", "plus four", "please")


class Recipe:
    """Overrides that turn any experiment into a tiny offline one."""

    def __init__(self, folder: Path, target_dir: Path) -> None:
        prompts = folder / "prompts.jsonl"
        self.text = folder / "text.txt"
        self.text.write_text(
            "".join(f"the cat sat on mat {i} and the dog ran\n" for i in range(300))
        )
        rng = random.Random(0)
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(40)]
        prompts.write_text(
            "".join(json.dumps({"prompt": p, "completion": "-"}) + "\n" for p in lines)
        )
        self.overrides = [
            f"target.name={target_dir}",
            "target.dtype=float32",
            "target.device=cpu",
            "trainer.precision=float32",
            "dataset=tiny",
            f"dataset.sources=[{{_target_: data_prep.source.files.Files, path: {prompts}}}]",
            f"dataset.root={folder / 'data'}",
            "+dataset.capture={_target_: data_prep.stage.capture.Capture, dtype: float32}",
            "drafter.draft_vocab_size=64",
            "data.tokens_per_batch=256",
            "trainer.max_steps=2",
            "final_decode.limit=2",
            "final_decode.max_new_tokens=6",
        ]

    def compose(self, *overrides: str, without: str | None = None) -> DictConfig:
        """`without` leaves out our own overrides that begin like this."""
        ours = [o for o in self.overrides if without is None or not o.startswith(without)]
        with initialize_config_module(config_module="conf", version_base=None):
            return compose("train", overrides=[*ours, *overrides])

    def run(
        self, run_dir: Path, *overrides: str, without: str | None = None, placed: bool = False
    ) -> Path:
        """Train in this process."""
        cfg = self.compose(*overrides, without=without)
        OmegaConf.set_readonly(cfg, True)
        return train_run(cfg, run_dir, placed=placed)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, target_dir: Path) -> Recipe:
    return Recipe(tmp_path_factory.mktemp("train"), target_dir)


# --- two real processes --------------------------------------------------------------------------


def place(name: str) -> list[str]:
    return [f"trainer={name}", "trainer.precision=float32", "trainer.devices=2", "trainer.nodes=1"]


def on_two_processes(plan: list[dict[str, Any]], folder: Path, timeout: float = 300.0) -> None:
    """Make a plan's runs (tests/train/ranks.py), one after the other, in one pair of processes."""
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*command, "-m", "tests.train.ranks", str(folder / "plan.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def rows(run_dir: Path) -> list[dict[str, float]]:
    """metrics.csv without the columns that measure time."""
    with (run_dir / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [{k: float(v) for k, v in r.items() if v and "_seconds" not in k} for r in table]


def assert_same(run_dir: Path, reference: Path, *, atol: float = 1e-6) -> None:
    """The same curve, weights and ranks, but for the order of sums."""
    ours, theirs = rows(run_dir), rows(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    a, b = (load_file(d / "drafter" / "model.safetensors") for d in (run_dir, reference))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], rtol=1e-5, atol=atol)
    ranks = [json.loads((d / "rank_accuracy.json").read_text()) for d in (run_dir, reference)]
    assert ranks[0] == ranks[1]
