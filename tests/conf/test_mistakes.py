"""One mistake of each kind, typed as a user types it: one sentence, soon, and a non-zero exit."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.target import Target
from tests.tiny import tiny_target

ROOT = Path(__file__).parents[2]
SOON_S = 60.0
"""Generous for a busy machine; alone, each takes about five seconds, most of it imports."""


def command(package: str, *overrides: str) -> tuple[int, str]:
    """Exit code and stderr with its white space folded."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", package, *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * SOON_S,
    )
    assert time.monotonic() - begin < SOON_S
    assert "Traceback" not in done.stderr
    return done.returncode, " ".join(done.stderr.split())


def dataset(tmp_path: Path, source: str, target: Path) -> list[str]:
    return [
        f"dataset.root={tmp_path}",
        "dataset.name=mine",
        f"dataset.sources=[{{_target_: data_prep.source.files.Files, path: {source}}}]",
        f"target.name={target}",
        f"hydra.run.dir={tmp_path}/run",
    ]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("datset=quickstart", "Could not override 'datset'"),
        ("dataset.holdot=3", "Could not override 'dataset.holdot'"),
        ("+dataset.holdot=3", "has no argument 'holdot'; did you mean 'holdout'?"),
        ("dataset.holdout=three", "dataset.holdout=three: should be a valid integer"),
        ("target.dtype=bf16", "should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("dataset=nosuch", "Could not find 'dataset/nosuch'"),
        ("show=many", "Error merging override show=many"),
        ("target.name=./no/such/model", "target.name='./no/such/model' looks like a folder"),
        ("target.name=package:no_such", "needs the Python package 'no_such'"),
    ],
)
def test_a_mistake_in_one_value(tmp_path: Path, override: str, sentence: str) -> None:
    code, said = command("data_prep", override, f"hydra.run.dir={tmp_path}/run")
    assert code != 0
    assert sentence in said


def test_a_missing_file(tmp_path: Path, target_dir: Path) -> None:
    code, said = command("data_prep", *dataset(tmp_path, "nowhere.jsonl", target_dir))
    assert code == 2
    assert "nowhere.jsonl" in said


def test_shards_of_another_target(tmp_path: Path, target: Target, target_dir: Path) -> None:
    """A finished dataset is bound to the weights that answered."""
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for i in range(6):
            file.write(json.dumps({"instruction": f"what is {i} ?", "response": "four"}) + "\n")
    arguments = [
        *dataset(tmp_path, str(tmp_path / "prompts.jsonl"), target_dir),
        "dataset.holdout=2",
        "dataset.respond.max_new_tokens=4",
    ]
    code, said = command("data_prep", *arguments)
    assert code == 0, said
    other = tmp_path / "other"
    tiny_target(seed=1).model.save_pretrained(other)
    target.tokenizer.save_pretrained(other)
    code, said = command("data_prep", *arguments, f"target.name={other}")
    assert code == 2
    assert "another target" in said
