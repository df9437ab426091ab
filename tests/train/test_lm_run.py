"""Whole runs of small language models: adapters and exits through training, resume and decoding."""

import json
from pathlib import Path

import pytest
import torch

from models.drafter.causal_lm import CausalLm
from models.drafter.load import load_drafter
from models.drafter.sorted_lm import SortedLm
from models.target import load_target
from tests.train.conftest import Recipe
from tests.train.test_resume import interrupted_run, same_run
from train.callbacks import Checkpoints

SETTINGS = [
    "trainer.max_steps=6",
    "trainer.val_every_steps=2",
    "callbacks.checkpoints.every_steps=3",
    "data.tokens_per_batch=128",
]
LORA = [
    *SETTINGS,
    "drafter=causal_lm",
    "drafter.keep=importance",
    "drafter.lora={r: 4, alpha: 8, dropout: 0.2}",
    "drafter.draft_vocab_size=64",
]


def test_adapters_resume_to_the_bit_and_are_saved_merged(
    recipe: Recipe, target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe.run(tmp_path / "whole", *LORA)
    interrupted_run(recipe, monkeypatch, 5, tmp_path / "run", *LORA)
    recipe.run(tmp_path / "unused", f"resume={tmp_path / 'run'}")
    same_run(tmp_path / "run", whole)
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert any("lora_B" in name for name in checkpoint["state_dict"])
    drafter = load_drafter(whole / "drafter", load_target(name=str(target_dir), dtype="float32"))
    assert isinstance(drafter, CausalLm)
    assert not any("lora" in name for name in drafter.state_dict())
    settings = json.loads((whole / "drafter" / "config.json").read_text())
    assert settings["lora"] is None
    assert settings["architecture"]["num_hidden_layers"] == 2
    # A run of the same shape goes on from there, with adapters of its own.
    recipe.run(tmp_path / "next", *LORA, f"start={whole}")


def test_the_best_drafter_comes_back_into_a_run_with_adapters(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an earlier validation was the best, its merged weights are what the run ends with."""
    end = Checkpoints.on_validation_end

    def worse_later(self: Checkpoints, trainer, pl_module) -> None:
        trainer.callback_metrics[self.monitor] = torch.tensor(-float(trainer.global_step))
        end(self, trainer, pl_module)

    monkeypatch.setattr(Checkpoints, "on_validation_end", worse_later)
    run_dir = recipe.run(tmp_path / "run", *LORA)
    best, last = (run_dir / f / "model.safetensors" for f in ("checkpoints/best", "drafter"))
    assert best.read_bytes() == last.read_bytes()


def test_exits_are_trained_and_decoded(recipe: Recipe, target_dir: Path, tmp_path: Path) -> None:
    run_dir = recipe.run(
        tmp_path / "run",
        *SETTINGS,
        "drafter=sorted_lm",
        "drafter.draft_vocab_size=64",
        "drafter.thresholds=[0.05, 0.05]",
        "tree@final_decode.tree=chain",
    )
    header = (run_dir / "metrics.csv").read_text().splitlines()[0]
    assert "val/agreement_2" in header
    ranks = json.loads((run_dir / "rank_accuracy.json").read_text())["accuracy"]
    assert len(ranks) == 8
    assert ranks[0] == ranks[7]
    drafter = load_drafter(run_dir / "drafter", load_target(name=str(target_dir), dtype="float32"))
    assert isinstance(drafter, SortedLm)
    assert drafter.thresholds == [0.05, 0.05]
