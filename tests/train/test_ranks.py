"""Two real processes (Gloo) and one: the same numbers, whatever shares the work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scripts.consolidate import consolidate
from tests.train.conftest import Recipe, assert_same, on_two_processes, place
from train.resume import find_checkpoint

STRATEGIES = ("ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3")
# Dropout, a layer over all positions, accumulation, validation and checkpoints out of step.
SETTINGS = [
    "drafter.num_layers=2",
    "drafter.dropout=0.3",
    "drafter.prefix_layer=true",
    "trainer.max_steps=11",
    "trainer.epochs=null",
    "trainer.val_every_steps=4",
    "callbacks.checkpoints.every_steps=3",
    "callbacks.checkpoints.keep_every_steps=10",
    "data.tokens_per_batch=96",
    "final_decode=null",
]
# Each strategy in turn is stopped after these steps: at checkpoints, at a validation, between them.
STOPS = {"ddp": 2, "fsdp2": 4, "deepspeed_1": 6, "deepspeed_2": 8, "deepspeed_3": 10}


@pytest.fixture(scope="module")
def folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`: a process that takes two micro-batches a step. Two processes that take one each: a run
    of every strategy, and `relay`: five strategies that hand over one run."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe.run(folder / "one", *SETTINGS, "trainer.accumulate=2")
    ours = [o for o in recipe.overrides if not o.startswith("final_decode")]
    plan: list[dict[str, Any]] = [
        {
            "run_dir": str(folder / name),
            "overrides": [*place(name), *ours, *SETTINGS],
        }
        for name in STRATEGIES
    ]
    for name, stop in STOPS.items():
        resume = [f"resume={folder / 'relay'}"] if name != "ddp" else []
        overrides = [*place(name), *ours, *SETTINGS, *resume]
        plan.append({"run_dir": str(folder / "relay"), "overrides": overrides, "stop": stop})
    on_two_processes(plan, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_give_the_curve_of_one(folder: Path, name: str) -> None:
    assert_same(folder / name, folder / "one")
    facts = json.loads((folder / name / "run.json").read_text())
    assert (facts["processes"], facts["micro_batches"], facts["finished"]) == (2, 2, True)


@pytest.mark.slow
def test_one_run_goes_through_all_strategies_and_back_to_one_process(
    folder: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each checkpoint is read by another strategy; the end is trained by a single process."""
    relay = folder / "relay"
    assert find_checkpoint(relay).step == STOPS["deepspeed_3"]
    assert not (relay / "drafter").exists()
    content = torch.load(relay / "checkpoints" / "last.ckpt", weights_only=True)
    one = torch.load(folder / "one" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"].keys() == one["state_dict"].keys()
    states = [c["optimizer_states"][0] for c in (content, one)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for ours, theirs in zip(*(s["param_groups"] for s in states), strict=True):
        assert ours["params"] == theirs["params"]
    # As a drafter folder it is what one process had learned by then.
    step = f"step-{STOPS['deepspeed_3']:08d}.ckpt"
    ours, theirs = (
        load_file(consolidate(run, name, str(folder / f"{run.name}-drafter")) / "model.safetensors")
        for run, name in ((relay, None), (folder / "one", f"checkpoints/{step}"))
    )
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=1e-5, atol=1e-6)
    copy = folder / "relay-on-one"
    shutil.copytree(relay, copy)
    recipe.run(copy, f"resume={copy}", placed=True)
    assert_same(copy, folder / "one")
    assert json.loads((copy / "run.json").read_text())["processes"] == 1


@pytest.mark.slow
def test_a_step_is_shared_by_divisors_only(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder / "relay", copy)
    with pytest.raises(ValueError, match=r"cannot be shared by 3 processes.*with 1 or 2 processes"):
        recipe.run(copy, f"resume={copy}", "trainer=ddp", "trainer.devices=3", placed=True)


def test_several_processes_need_a_strategy(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose how they share the work: trainer=ddp"):
        recipe.run(tmp_path / "run", "trainer.devices=2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "but trainer.devices is 1"),
        (["trainer=ddp", "trainer.devices=2"], "but final_decode runs it in one process alone"),
    ],
)
def test_a_target_in_shards_needs_processes_that_all_run_it(
    recipe: Recipe, tmp_path: Path, given: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.run(tmp_path / "run", *given, "trainer.shard_target=true")
    assert not (tmp_path / "run").exists()
