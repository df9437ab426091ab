"""Trimming a finished run from the command: the table's numbers, and the run that is written."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from conf.check import check
from data_prep.shards import ShardReader
from decode.__main__ import SUPPLIED, decode
from models.run import open_run
from scripts.trim import trim
from tests.train.conftest import Recipe


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base=None):
        return compose(command, overrides=list(overrides))


def test_the_config_is_whole() -> None:
    check(composed("trim", "run=x"), runtime=SUPPLIED)


@pytest.mark.slow
def test_from_run_to_smaller_run(
    tmp_path: Path,
    target_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    recipe = Recipe(tmp_path, target_dir)
    run = recipe.run(tmp_path / "run", "drafter.draft_vocab_size=60", "trainer.max_steps=2")
    data = Path(open_run(run).config.dataset.root) / open_run(run).config.dataset.name
    common = [f"run={run}", "max_new_tokens=10", "gamma=2", "dtype=float32"]
    out = tmp_path / "smaller"
    sizes = "sizes=[8,30,60,300]"
    made = trim(composed("trim", *common, sizes, f"data=['{data}']", "size=8", f"out={out}"))
    assert made == out
    assert "compared are 8, 30" in capsys.readouterr().err

    found = json.loads((out / "results.json").read_text())
    assert [row["size"] for row in found["rows"]] == [8, 30]
    assert found["whole"]["size"] == 60
    assert found["whole"]["tau_ratio"]["value"] == 1.0
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    # Coverage, once more from the shards: the most frequent of the drafter's ids, and EOS.
    full = open_run(run)
    target = full.load_target("float32")
    drafter = full.load_drafter(target)
    assert drafter.draft_ids_D is not None
    counts_V = torch.zeros(target.vocab_size)
    reader = ShardReader(data, "train")
    for i in range(len(reader)):
        for token in reader[i].tokens[reader[i].learn].tolist():
            counts_V[token] += 1
    small = open_run(out).load_drafter(target)
    assert small.draft_ids_D is not None
    kept = set(small.draft_ids_D.tolist())
    assert len(kept) == 8
    assert kept <= set(drafter.draft_ids_D.tolist())
    assert set(target.eos_ids) <= kept
    least = min(float(counts_V[i]) for i in kept - set(target.eos_ids))
    left = set(drafter.draft_ids_D.tolist()) - kept
    assert max(float(counts_V[i]) for i in left) <= least
    covered = float(counts_V[list(kept)].sum() / counts_V.sum())
    assert found["rows"][0]["coverage"] == pytest.approx(covered)
    # Fewer bytes, and only those of the head's rows: gamma drafts, each with a head of its own.
    d = target.hidden_size
    assert found["whole"]["draft_bytes"] - found["rows"][0]["draft_bytes"] == 2 * 4 * 52 * d

    # What was written is a run: the decoder gives the tokens per step of the table.
    assert open_run(out).facts["trimmed"]["size"] == 8
    settings = [f"run={out}", "max_new_tokens=10", "tree.gamma=2", "dtype=float32"]
    assert decode(composed("decode", *settings, "lossless=true")) == 0
    real = json.loads((out / "decode" / "heldout-chain2-T0" / "results.json").read_text())
    assert real["tau"] == found["rows"][0]["tau"]
    with pytest.raises(ValueError, match="exists already"):
        trim(composed("trim", *common, sizes, "size=8", f"out={out}"))
    with pytest.raises(ValueError, match="should be smaller than the 60 tokens"):
        trim(composed("trim", *common, "sizes=[60]"))
