"""On-policy training as a command: resumed to the bit, refused early, reported."""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.train.conftest import Recipe
from tests.train.test_resume import interrupted_run

# Replay, planned and sampled micro-batches in one step, several checkpoints between.
SETTINGS = [
    "drafter=causal_lm",
    "head@drafter.head=own",
    "onpolicy=gkd",
    "onpolicy.fraction=0.7",
    "onpolicy.max_new_tokens=8",
    "onpolicy.replay={size:16,share:0.5}",
    "trainer.max_steps=11",
    "trainer.epochs=null",
    "trainer.accumulate=2",
    "trainer.val_every_steps=4",
    "callbacks.checkpoints.every_steps=3",
    "data.tokens_per_batch=128",
    "final_decode=null",
]


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nobody interrupts."""
    return recipe.run(tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that measure time."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in table]


def results(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "run.json").read_text())["results"]["onpolicy"]


# 2: before a checkpoint; 3: at one; 4: at a validation; 8: a checkpoint old.
@pytest.mark.parametrize("step", [2, 3, 4, 8])
def test_resumed_is_the_same_run(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run_dir = tmp_path / "run"
    interrupted_run(recipe, monkeypatch, step, run_dir, *SETTINGS)
    torch.manual_seed(123)  # whatever the random state was
    recipe.run(tmp_path / "unused", f"resume={run_dir}")
    assert rows(run_dir) == rows(whole)
    for file in ("drafter/model.safetensors", "rank_accuracy.json"):
        assert (run_dir / file).read_bytes() == (whole / file).read_bytes(), file
    for name in ("sampled", "replayed", "sequences"):
        assert results(run_dir)[name] == results(whole)[name] > 0


def test_what_was_sampled_is_reported(whole: Path) -> None:
    steps = [row for row in rows(whole) if row["train/loss"]]
    sampled, replayed = (
        [float(row[f"train/{name}_tokens"]) for row in steps] for name in ("sampled", "replayed")
    )
    assert sum(sampled) == results(whole)["sampled"]
    assert sum(replayed) == results(whole)["replayed"]
    assert 0 < sum(x > 0 for x in replayed) < len(steps) == 11
    assert results(whole)["sampling_seconds"] > results(whole)["teaching_seconds"] > 0


def test_the_state_is_tensors_and_numbers(whole: Path) -> None:
    content = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = content["onpolicy"]
    ring = state["ring"]
    assert len(ring["length_B"]) == 16
    assert int(ring["length_B"].sum()) == len(ring["tokens_N"])
    assert (ring["prompt_B"] < ring["length_B"]).all()


def test_interleaved_runs_as_a_command(recipe: Recipe, tmp_path: Path) -> None:
    settings = [s for s in SETTINGS if not s.startswith(("onpolicy", "trainer.max"))]
    run_dir = recipe.run(
        tmp_path / "run",
        *settings,
        "onpolicy=speculative_kd",
        "onpolicy.max_new_tokens=6",
        "trainer.max_steps=2",
    )
    numbers = results(run_dir)
    assert numbers["judged"] == numbers["sampled"] > numbers["kept"] > 0
    kept = [float(row["train/kept"]) for row in rows(run_dir) if row["train/loss"]]
    assert all(0 < share < 1 for share in kept)


def test_a_family_that_reads_features_is_refused_at_once(recipe: Recipe, tmp_path: Path) -> None:
    """Before the target is looked for."""
    with pytest.raises(ValueError, match="HydraHeads has reads_features = True"):
        recipe.run(tmp_path / "run", "onpolicy=distillspec", "target.name=/nowhere/at/all")
    assert not (tmp_path / "run").exists()
