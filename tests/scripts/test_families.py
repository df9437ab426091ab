"""Two tiny runs and two methods without training, from cells to tables."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from conf.check import build, check
from decode.__main__ import SUPPLIED, decode
from models.drafter.hydra_heads import HydraHeads
from models.target import Target
from scripts import families_measure
from scripts.families import families
from scripts.families_cells import Store, label_of
from tests.decode.test_command import run  # noqa: F401

HEAD = {"_target_": "models.head.own.OwnHead"}
LENGTH = 10


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base=None):
        return compose(command, overrides=list(overrides))


@pytest.fixture
def runs(
    run: Path,  # noqa: F811
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[Path]:
    """A Medusa with three heads and a Hydra with two, with what training writes beside them."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    found = [tmp_path / "runs" / "medusa", tmp_path / "runs" / "hydra" / "20260101-120000"]
    for folder in found:
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("decode", "replay"))
    torch.manual_seed(0)
    drafter = HydraHeads(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        num_heads=2,
        head=HEAD,
    ).bind(target)
    drafter.init_from(target)
    drafter.save_pretrained(found[1] / "drafter")
    accuracy = [[0.3, 0.2, 0.1]] * 2
    (found[1] / "rank_accuracy.json").write_text(json.dumps({"accuracy": accuracy}))
    facts = json.loads((found[1] / "run.json").read_text())
    facts |= {
        "command": ["python", "-m", "train", "+experiment=hydra_heads"],
        "dataset": {"tokens_to_learn": 5000},
        "drafter": {"class": "HydraHeads", "trained": 1_500_000, "draft_vocab_size": None},
        "results": {"train_seconds": 120.0, "step": 40},
    }
    (found[1] / "run.json").write_text(json.dumps(facts))
    (found[1] / "metrics.csv").write_text("epoch,step\n1.0,20\n2.0,40\n,40\n")
    return found


def settings(out: Path, runs: list[Path], *more: str) -> DictConfig:
    asked = out.parent / "asked.jsonl"
    lines = [json.dumps({"prompt": f"the dog {i}", "category": "ab"[i % 2]}) for i in range(4)]
    asked.write_text("\n".join(lines) + "\n")
    return composed(
        "families",
        f"runs=[{','.join(map(str, runs))}]",
        f"out={out}",
        "bench@benches.spec_bench=file",
        f"benches.spec_bench.sources.0.path={asked}",
        "shapes.static.nodes=6",
        "shapes.dynamic.nodes=9",
        "shapes.dynamic.top_k=3",
        "baselines.token_recycling.nodes=9",
        f"max_new_tokens={LENGTH}",
        "timed_prompts=0",
        "dtype=float32",
        *more,
    )


def read(out: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(r["run"], r["bench"], r["T"], r["shape"]): r for r in rows if not r["category"]}


def test_the_config_is_complete() -> None:
    check(composed("families", "runs=[x]"), runtime=SUPPLIED)
    check(composed("families", "~baselines.token_recycling"), runtime=SUPPLIED)


def test_labels_are_folders_or_what_stands_above_a_time() -> None:
    assert label_of("runs/medusa/latest") == "medusa"
    assert label_of("runs/medusa/20261121-130454") == "medusa"
    assert label_of("runs/families/eagle") == "eagle"


@pytest.mark.slow
def test_from_runs_to_tables(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Greedy first, one run; then the other run and T=1 join.
    assert families(settings(out, runs[:1], "temperatures=[0.0]", "timed_prompts=1")) == 0
    first = {f: f.read_text() for f in out.glob("cells/*/*-T0-*.json")}
    assert families(settings(out, runs)) == 0
    assert {f: f.read_text() for f in first} == first, "a cell was made twice"
    rows = read(out)
    shapes = {"medusa": 3, "hydra": 3, "prompt_lookup": 1, "token_recycling": 1}
    assert len(rows) == sum(shapes.values()) * 2 * 2
    assert all(1.0 <= float(r["tau"]) < 9.0 for r in rows.values())
    # Asked for chains of 5, they make what they can.
    drafts = {
        label: rows[label, "heldout", "0", "chain"]["drafts"] for label in ("medusa", "hydra")
    }
    assert drafts == {"medusa": "chain3", "hydra": "chain2"}
    assert rows["prompt_lookup", "heldout", "1", "own"]["drafts"] == "lookup8"
    assert rows["medusa", "spec_bench", "0", "dynamic"]["break_even"] != ""
    assert rows["hydra", "spec_bench", "0", "dynamic"]["break_even"] == ""

    # The decoder itself gives the same numbers.
    for shape, tree in (
        ("chain", ["tree.gamma=3"]),
        ("static", ["tree=static", "tree.nodes=6"]),
        ("dynamic", ["tree=dynamic", "tree.nodes=9", "tree.top_k=3"]),
    ):
        common = [f"run={runs[0]}", f"max_new_tokens={LENGTH}", "dtype=float32", "baseline=false"]
        assert decode(composed("decode", *common, *tree)) == 0
        (report,) = (runs[0] / "decode").glob("*/results.json")
        real = json.loads(report.read_text())
        ours = rows["medusa", "heldout", "0", shape]
        assert ours["drafts"] == real["shape"]
        for name, key in (("tau", "value"), ("tau_low", "low"), ("tau_high", "high")):
            assert ours[name] == f"{real['tau'][key]:.4f}"
        assert ours["mbsu"] == f"{real['mbsu']:.4f}"
        shutil.rmtree(runs[0] / "decode")

    text = (out / "table.md").read_text()
    share = (
        1_500_000 / json.loads((out / "cells/hydra/entry.json").read_text())["target_parameters"]
    )
    line = next(x for x in text.splitlines() if x.startswith("| hydra | HydraHeads"))
    assert f"| 1.50 M | {share:.1%} | all | 2.0 | 83 | 40 |" in line  # 2 epochs of 5,000 / 120 s
    assert "(chain2)" in text
    # The other run's numbers less those of the one that leads, or of the one asked for.
    leader = rows["medusa", "heldout", "0", "chain"]["beside"] or "medusa"
    other = {"medusa": "hydra", "hydra": "medusa"}[leader]
    for key in [("heldout", "0", "chain"), ("spec_bench", "1", "dynamic")]:
        mine, theirs = rows[other, *key], rows[leader, *key]
        less = float(mine["tau"]) - float(theirs["tau"])
        assert float(mine["difference"]) == pytest.approx(less, abs=2e-4)
        assert float(mine["difference_low"]) <= less + 2e-4
        assert theirs["difference"] == ""
    assert rows["prompt_lookup", "heldout", "0", "own"]["difference"] == ""
    assert f"| less {leader}, prompt by prompt | chain3 |" in text
    assert "### Tokens per step: spec_bench, T=1 (4 prompts" in text
    assert "### spec_bench, T=0 (4 prompts" in (out / "categories.md").read_text()
    assert (out / "tau.png").read_bytes().startswith(b"\x89PNG")
    # The report alone, of everything that is there.
    (out / "table.md").unlink()
    assert families(settings(out, [], "measure=false")) == 0
    assert (out / "table.md").read_text() == text
    assert families(settings(out, [], "measure=false", f"beside={other}")) == 0
    assert f"| less {other}, prompt by prompt |" in (out / "table.md").read_text()
    for wrong in ("eagle", "prompt_lookup"):
        with pytest.raises(ValueError, match=f"beside={wrong} is none of the runs"):
            families(settings(out, [], "measure=false", f"beside={wrong}"))


def few(out: Path, runs: list[Path], *more: str) -> DictConfig:
    """One cell a run."""
    none = ["~baselines.token_recycling", "~baselines.prompt_lookup", "~shapes.static"]
    none += ["~shapes.dynamic", "~benches.heldout", "temperatures=[0.0]", "gamma=2"]
    keep = settings_args(out, runs)
    return composed("families", *keep, *none, *more)


def settings_args(out: Path, runs: list[Path]) -> list[str]:
    settings(out, runs)  # writes the prompts
    return [
        f"runs=[{','.join(map(str, runs))}]",
        f"out={out}",
        "bench@benches.spec_bench=file",
        f"benches.spec_bench.sources.0.path={out.parent / 'asked.jsonl'}",
        f"max_new_tokens={LENGTH}",
        "timed_prompts=0",
        "dtype=float32",
    ]


def test_a_cell_that_another_process_makes_is_left_to_it(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    store, made = Store(out), []
    real = families_measure.replay

    def counted(**arguments: Any) -> Any:
        made.append(arguments["drafter"])
        return real(**arguments)

    monkeypatch.setattr(families_measure, "replay", counted)
    with store.claimed("medusa--spec_bench-T0-chain") as mine:
        assert mine
        assert families(few(out, runs)) == 0
        assert [type(d).__name__ for d in made] == ["HydraHeads"]
        assert not store.file("medusa", "spec_bench-T0-chain").is_file()
    assert families(few(out, runs)) == 0
    assert [type(d).__name__ for d in made] == ["HydraHeads", "Medusa"]
    assert families(few(out, runs)) == 0
    assert len(made) == 2


def test_what_is_not_comparable_is_refused(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert families(few(out, runs[1:])) == 0
    with pytest.raises(ValueError, match=r"limit: 80 then, 3 now"):
        families(few(out, runs[1:], "limit=3"))
    with pytest.raises(ValueError, match="made with another shape"):
        families(few(out, runs[1:], "gamma=1"))
    weights = runs[1] / "drafter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="made with another stamp"):
        families(few(out, runs[1:]))
    again = shutil.copytree(runs[0], tmp_path / "elsewhere" / "medusa")
    with pytest.raises(ValueError, match="which is already"):
        families(few(out, [runs[0], again]))
    with pytest.raises(ValueError, match="nothing to measure"):
        families(few(out, []))
    with pytest.raises(ValueError, match="nothing to report"):
        families(few(tmp_path / "empty", [], "measure=false"))
    # A cell that cannot be made is said, and the others are.
    other = tmp_path / "other"
    deep = ["+tree@shapes.deep=chain", "shapes.deep.gamma=7"]
    assert families(few(other, runs[:1], *deep)) == 1
    assert len(list(other.glob("cells/medusa/spec_bench-*.json"))) == 1


def test_build_gives_plain_methods() -> None:
    """What the command builds from its own config."""
    cfg = composed("families")
    assert build(cfg.baselines.prompt_lookup).name == "lookup8"
    assert build(cfg.shapes.dynamic).nodes == 60
