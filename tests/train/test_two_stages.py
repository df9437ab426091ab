"""A family that is pretrained on plain text and goes on with the target's answers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.train.conftest import Recipe


def test_the_mlp_speculator_goes_on_from_its_first_stage(recipe: Recipe, tmp_path: Path) -> None:
    """Stage 2 at a rate of 0 ends with the weights and the draft vocabulary of stage 1."""
    first = recipe.run(tmp_path / "first", "+experiment=mlp_speculator_pretrain", "vocab_from=null")
    second = recipe.run(
        tmp_path / "second", "+experiment=mlp_speculator", f"start={first}", "optimizer.lr=0.0"
    )
    before, after = (load_file(run / "drafter" / "model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight)
    assert json.loads((second / "run.json").read_text())["finished"]
