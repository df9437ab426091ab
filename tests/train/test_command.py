import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conf.check import ConfigError
from models.run import open_run
from tests.train.conftest import Recipe

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))


def arguments(recipe: Recipe, tmp_path: Path, experiment: str) -> list[str]:
    """What an experiment needs beside the recipe: earlier runs, and plain text to mix in."""
    given = [f"+experiment={experiment}"]
    cfg = recipe.compose(*given, without="final_decode")
    if cfg.mix is not None:
        source = f"{{_target_: data_prep.source.files.Files, path: {recipe.text}}}"
        given += [f"mix.dataset.sources=[{source}]", f"mix.dataset.root={tmp_path / 'data'}"]
        given += ["mix.dataset.holdout=1", "mix.dataset.tokenize.max_tokens=64"]
    if cfg.vocab_from is not None:
        given.append("vocab_from=null")
    if "rank" in (cfg.drafter.get("head") or {}):
        given.append("drafter.head.rank=8")  # the tiny target is narrower than real ranks
    if cfg.weighting is not None and OmegaConf.is_missing(cfg.weighting, "reference"):
        reference = recipe.run(tmp_path / "reference", "+experiment=small_lm")
        given += [f"start={reference}", f"weighting.reference={reference / 'drafter'}"]
    if cfg.acceptance is not None:
        reference = recipe.run(tmp_path / "reference", "+experiment=small_lm")
        given += [f"start={reference}", "acceptance.temperature=0", "acceptance.stride=4"]
    return given


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_two_steps(recipe: Recipe, tmp_path: Path, experiment: str) -> None:
    given = arguments(recipe, tmp_path, experiment)
    decodes = recipe.compose(*given, without="final_decode").final_decode is not None
    run_dir = recipe.run(
        tmp_path / "runs" / "x", *given, without=None if decodes else "final_decode"
    )
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["finished"]
    assert facts["results"]["tau"] >= 1.0 if decodes else "tau" not in facts["results"]
    assert (tmp_path / "runs" / "latest").resolve() == run_dir.resolve()

    run = open_run(run_dir)
    target = run.load_target()
    drafter = run.load_drafter(target)
    assert facts["drafter"]["depths"] == drafter.num_depths
    assert facts["dataset"]["hash"]
    ranks = run.rank_accuracy()
    # The last row of a drafter without a longest draft stands for every deeper one.
    assert len(ranks) == drafter.num_depths or drafter.max_depth is None
    assert {len(r) for r in ranks} == {10}
    served = drafter.measured_depths - 1
    for k, row in [(served, ranks[-1])] if drafter.max_depth is None else enumerate(ranks):
        assert sum(row) == pytest.approx(facts["results"]["val"][f"top10_{k}"])
    assert drafter.draft_ids_D is not None
    assert set(target.eos_ids) <= set(drafter.draft_ids_D.tolist())
    rows = (run_dir / "metrics.csv").read_text().splitlines()
    assert [r.split(",")[1] for r in rows if r.split(",")[2]] == ["step", "1", "2"]


def test_experiment_header_names_its_command() -> None:
    for name in EXPERIMENTS:
        text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
        assert re.search(rf"python -m train \+experiment={name}[ \n]", text)
        assert f"\nname: {name}\n" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("drafter.num_heads=three", "drafter.num_heads=three"),
        ("+drafter.num_head=3", "did you mean 'num_heads'"),
        ("teacher.source=disk", "teacher.source=disk"),
        ("+loss.beta=0.5", "has no argument 'beta'"),
        ("optimizer.lr=fast", "optimizer.lr=fast"),
        ("+trainer.max_epochs=3", "has no argument 'max_epochs'"),
        ("data.tokens_per_batch=2.5", "data.tokens_per_batch=2.5"),
    ],
)
def test_config_errors_are_found_before_anything_is_loaded(
    recipe: Recipe, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.name=/nowhere/at/all", "looks like a folder"),
        ("callbacks.console.every_steps=0", "must be 1 or more"),
        ("data.tokens_per_batch=4", "tokens_per_batch=4 is too small"),
        ("drafter.draft_vocab_size=9999", "draft_vocab_size=9999 must lie between"),
        ("trainer.epochs=null trainer.max_steps=null", "never end"),
    ],
)
def test_bad_values_get_a_sentence(
    recipe: Recipe, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.run(tmp_path / "run", *override.split())


def test_shards_are_demanded_in_vain(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no feature shards"):
        recipe.run(
            tmp_path / "run",
            "teacher=shards",
            "dataset.capture=null",
            f"dataset.root={tmp_path / 'data'}",
        )


def test_the_drafter_is_the_best_of_the_run(recipe: Recipe, tmp_path: Path) -> None:
    """A rate that ruins the drafter: what is saved is the best validated one, with its numbers."""
    run_dir = recipe.run(
        tmp_path / "run",
        "trainer.max_steps=6",
        "trainer.val_every_steps=2",
        "optimizer.lr=3.0",
        "callbacks.checkpoints.monitor=val/overlap_0",
    )
    facts = json.loads((run_dir / "run.json").read_text())
    header, *lines = (run_dir / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    overlaps = [
        (float(row[columns.index("val/overlap_0")]), int(row[columns.index("step")]))
        for row in (line.split(",") for line in lines)
        if row[columns.index("val/overlap_0")]
    ]
    best = max(overlaps)
    assert facts["results"]["step"] == best[1]
    assert facts["results"]["val"]["overlap_0"] == pytest.approx(best[0], rel=1e-5)


def test_wandb_offline(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = recipe.run(
        tmp_path / "run", "logger=wandb", "logger.wandb.offline=true", "final_decode=null"
    )
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert (run_dir / "metrics.csv").is_file()


def test_no_environment_in_the_run_folder(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisisasecret")
    run_dir = recipe.run(tmp_path / "run", "final_decode=null")
    for path in run_dir.rglob("*"):
        if path.is_file():
            assert b"thisisasecret" not in path.read_bytes(), path


def test_command_line_error_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train", f"resume={tmp_path / 'nothing'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_losses_are_numbers(recipe: Recipe, tmp_path: Path) -> None:
    """Untrained heads over a known vocabulary: the first loss is that of the heads at the start."""
    run_dir = recipe.run(
        tmp_path / "run", "loss=cross_entropy", "final_decode=null", "trainer.max_steps=1"
    )
    header, first, *_ = (run_dir / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    total = sum(float(row[f"train/loss_{k}"]) for k in range(4))
    assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)
    assert total > 4 * 0.5 * math.log(2)
    assert torch.isfinite(torch.tensor(total))


@pytest.mark.parametrize("tree", ["sequoia", "dynamic"])
def test_a_run_ends_with_any_tree(recipe: Recipe, tmp_path: Path, tree: str) -> None:
    run_dir = recipe.run(tmp_path / "run", f"tree@final_decode.tree={tree}")
    assert [f.name for f in (run_dir / "decode").glob(f"heldout-{tree}*-T0")]
    assert (run_dir / "decode" / "cost.json").is_file() == (tree == "sequoia")
