"""Every drafter family on two processes (Gloo): the numbers of one, whatever shares the work."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from models.target import Target
from tests.train.conftest import Recipe, assert_same, on_two_processes, place

FAMILIES = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "drafter").glob("*.yaml"))
EXPERIMENTS = {"causal_lm": "small_lm"}
"""The experiment of a family, where it has another name."""
STRATEGIES = ("ddp", "fsdp2", "deepspeed_3")
SETTINGS = [
    "trainer.max_steps=3",
    "trainer.epochs=null",
    "trainer.val_every_steps=2",
    "callbacks.checkpoints.every_steps=3",
    "data.tokens_per_batch=96",
    "final_decode=null",
]
# Sampled text depends on the process it was written by: DDP is the reference, nothing is sharded.
WRITING = ["onpolicy=gkd", "onpolicy.fraction=0.7", "onpolicy.max_new_tokens=8"]
JUDGING = ["+experiment=specdec_pp", "acceptance.temperature=0", "acceptance.stride=9"]
# Rounding of a gradient near zero is a part of AdamW's first steps (1e-3), in a few places.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<what>/one` by a process that takes two micro-batches a step; `<what>/<strategy>` by two
    processes that take one each."""
    folder = tmp_path_factory.mktemp("families")
    ours = [o for o in recipe.overrides if not o.startswith("final_decode")]
    plan: list[dict[str, Any]] = []

    def add(what: str, given: list[str], *, alone: bool = True) -> None:
        given = [*given, *SETTINGS]
        if alone:
            recipe.run(
                folder / what / "one", *given, "trainer.accumulate=2", without="final_decode"
            )
        for name in STRATEGIES:
            overrides = [*place(name), *ours, *given]
            plan.append({"run_dir": str(folder / what / name), "overrides": overrides})

    for family in FAMILIES:
        add(family, [f"+experiment={EXPERIMENTS.get(family, family)}"])
    judging = [*JUDGING, f"start={folder / 'causal_lm' / 'one'}"]
    add("judged", [*judging, "acceptance.reads=candidate"])
    add("judged_too", [*judging, "acceptance.frozen=false", "acceptance.reads=drawn"])
    add("recomputed", ["+experiment=small_lm", "trainer.recompute=true"], alone=False)
    add("onpolicy", ["+experiment=small_lm", *WRITING], alone=False)
    reading = ["+experiment=eagle3", "teacher=online"]
    add("online", [*reading, "trainer.shard_target=true"], alone=False)
    recipe.run(
        folder / "online" / "one",
        *reading,
        *SETTINGS,
        "trainer.accumulate=2",
        without="final_decode",
    )
    on_two_processes(plan, folder, timeout=400)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_the_numbers_of_one(folder: Path, family: str, name: str) -> None:
    assert_same(folder / family / name, folder / family / "one", atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("what", ["judged", "judged_too"])
def test_an_acceptance_head_is_the_same(folder: Path, what: str, name: str) -> None:
    made, one = folder / what / name, folder / what / "one"
    assert_same(made, one, atol=TOLERANCE)
    heads = [load_file(d / "drafter" / "acceptance.safetensors") for d in (made, one)]
    assert heads[0].keys() == heads[1].keys()
    for key, weight in heads[0].items():
        assert weight.numpy() == pytest.approx(heads[1][key].numpy(), abs=TOLERANCE), key
    start = load_file(folder / "causal_lm" / "one" / "drafter" / "model.safetensors")
    after = load_file(made / "drafter" / "model.safetensors")
    assert all(start[k].equal(after[k]) for k in start) == (what == "judged")


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_activations_computed_again_are_the_same(folder: Path, name: str) -> None:
    assert_same(folder / "recomputed" / name, folder / "causal_lm" / "one", atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_3"])
def test_a_sharded_drafter_writes_what_a_whole_one_does(folder: Path, name: str) -> None:
    assert_same(folder / "onpolicy" / name, folder / "onpolicy" / "ddp", atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_target_in_shards_is_the_same_target(folder: Path, name: str) -> None:
    """Its features, inner layers and logits, computed in every step."""
    assert_same(folder / "online" / name, folder / "online" / "one", atol=TOLERANCE)


@pytest.mark.slow
def test_each_process_holds_half_of_the_layers(folder: Path, target: Target) -> None:
    layers = sum(p.numel() for p in target.layers.parameters())
    half = (target.num_parameters - layers / 2) / 1e6
    said = re.findall(r"each process holds ([\d.]+) M", (folder / "log.txt").read_text())
    assert said == [f"{half:.2f}"] * len(STRATEGIES)
