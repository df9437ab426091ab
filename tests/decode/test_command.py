"""`python -m decode` as a user runs it, on a tiny run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from conf.check import check
from data_prep.shards import Example, write_tokens
from decode.__main__ import SUPPLIED, decode
from decode.prompts import HeldOut
from models.drafter.medusa import Medusa
from models.target import Target

ROOT = Path(__file__).parents[2]
HEAD = {"_target_": "models.head.own.OwnHead"}
FITTED = {"chain": ["tree.gamma=3"], "sampled": ["tree.widths=[2,2,1]"]}
"""Settings a tree needs for three heads."""
TREES = sorted(path.stem for path in (ROOT / "conf" / "tree").glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base=None):
        return compose("decode", overrides=list(overrides))


@pytest.fixture(scope="module")
def run(target: Target, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: config, facts, drafter, rank accuracies and held-out examples."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    drafter = Medusa(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, num_heads=3, head=HEAD
    ).bind(target)
    drafter.init_from(target)
    drafter.save_pretrained(folder / "drafter")
    data = folder.parent / "data" / "words"
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(6):
        tokens = torch.randint(3, target.vocab_size, (12 + i,), generator=generator)
        learn = torch.arange(12 + i) >= 4 + i
        rows.append(Example(f"talk/{i}", tokens, learn, category="abc"[i % 3]))
    rows.append(Example("talk/6", rows[0].tokens.clone(), rows[0].learn.clone(), category="a"))
    plain = torch.ones(12, dtype=torch.bool)
    rows.append(Example("text/0", rows[1].tokens[:12].clone(), plain, category=None))
    splits = {"val": {"tokens": write_tokens(data / "val", rows, 99), "features": []}}
    (data / "manifest.json").write_text(json.dumps({"splits": splits}))
    config = {
        "target": {
            "_target_": "models.target.load_target",
            "name": str(target_dir),
            "dtype": "float32",
        },
        "dataset": {"root": str(data.parent), "name": "words"},
    }
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
    facts = {
        "fingerprint": target.fingerprint(),
        "template_hash": target.template_hash(),
    }
    (folder / "run.json").write_text(json.dumps({"target": facts, "finished": True}))
    accuracy = [[0.3, 0.2, 0.1]] * 3
    (folder / "rank_accuracy.json").write_text(json.dumps({"accuracy": accuracy, "positions": 9}))
    return folder


def test_held_out_prompts_end_before_the_first_learned_token(run: Path) -> None:
    folder = run.parent / "data" / "words"
    prompts = HeldOut(dataset_folder=folder).prompts(limit=None, max_prompt_tokens=7)
    # talk/6 asks the same as talk/0, text/0 asks nothing, talk/4 and talk/5 are too long.
    assert [p.id for p in prompts] == ["talk/0", "talk/1", "talk/2", "talk/3"]
    assert [len(p.tokens) for p in prompts] == [4, 5, 6, 7]
    assert [p.category for p in prompts] == ["a", "b", "c", "a"]
    assert len(HeldOut(dataset_folder=folder).prompts(limit=2, max_prompt_tokens=None)) == 2
    with pytest.raises(ValueError, match="name another bench"):
        HeldOut(dataset_folder=run).prompts(limit=None, max_prompt_tokens=None)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_tree_of_the_configuration_decodes(run: Path, tree: str, temperature: float) -> None:
    given = [f"run={run}", f"tree={tree}", f"temperature={temperature}", "limit=1"]
    greedy = "lossless=true" if temperature == 0.0 else "baseline=false"
    before = set((run / "decode").glob("*"))
    assert decode(composed(*given, "max_new_tokens=10", greedy, *FITTED.get(tree, []))) == 0
    new = [f for f in (run / "decode").glob("*") if f not in before and f.is_dir()]
    results = json.loads((new[0] / "results.json").read_text())
    assert results["nodes_per_round"] > 1
    assert len(results["reached_by_depth"]) <= 3
    assert tree != "sequoia" or (run / "decode" / "cost.json").is_file()


def test_the_command_reports_and_keeps_to_the_floor(run: Path) -> None:
    command = [sys.executable, "-m", "decode", f"run={run}", "max_new_tokens=12", "lossless=true"]
    made = subprocess.run(
        [*command, "tree=static", "tree.nodes=7", "floor=9"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "160"},  # rich wraps tables to the terminal
        check=False,
    )
    assert made.returncode == 1, made.stderr
    assert "below the floor of 9" in made.stderr
    assert "bonus token included" in made.stderr
    results = json.loads((run / "decode" / "heldout-tree7-T0" / "results.json").read_text())
    assert results["prompts"] == 6
    assert results["lossless"]["identical"] == 6
    assert results["config"]["tree"]["nodes"] == 7
    assert 1.0 <= results["tau"]["value"] <= 4.0
    assert (run / "decode" / "heldout-tree7-T0" / "plot.png").is_file()


def test_sampling_and_a_reached_floor(run: Path) -> None:
    cfg = composed(
        f"run={run}", "temperature=0.8", "tree.gamma=3", "max_new_tokens=8", "floor=1", "limit=2"
    )
    assert decode(cfg) == 0
    assert decode(cfg) == 0  # a second report stands beside the first
    names = {p.name for p in (run / "decode").glob("heldout-chain3-T0.8*")}
    assert names == {"heldout-chain3-T0.8", "heldout-chain3-T0.8-2"}


def test_drafts_end_where_the_drafter_is_not_sure(run: Path) -> None:
    common = [f"run={run}", "max_new_tokens=8", "limit=3", "baseline=false", "tree.gamma=3"]
    assert decode(composed(*common)) == 0
    assert decode(composed(*common, "stop=confidence", "stop.threshold=1")) == 0
    found = {}
    for name in ("heldout-chain3-T0", "heldout-chain3-confidence1-T0"):
        found[name] = json.loads((run / "decode" / name / "results.json").read_text())
    whole, ended = found.values()
    assert whole["nodes_per_round"] == 4
    # Nothing is certain, so each draft ends behind its first token: the one of the whole drafts.
    assert ended["nodes_per_round"] == 2
    assert len(ended["alpha_by_depth"]) == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["tree=static"], "has no use for it"),
        (["replay=chains", "replay.gammas=[1]"], "stop ends drafts early"),
    ],
)
def test_what_cannot_be_stopped_is_refused(run: Path, overrides: list[str], sentence: str) -> None:
    cfg = composed(f"run={run}", "stop=confidence", *overrides)
    with pytest.raises(ValueError, match=sentence):
        decode(cfg)


def test_a_tuning_predicts_and_confirms(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    common = [f"run={run}", "max_new_tokens=10", "limit=3", "tree.gamma=1"]
    with pytest.raises(ValueError, match="tune=true"):
        decode(composed(*common, "stop=spec_kv"))
    plan = ["tuning.gamma=3", "tuning.timed_prompts=1", "tuning.confirm_prompts=2"]
    assert decode(composed(*common, "tune=true", *plan)) == 0
    folder = run / "tune" / "heldout-T0"
    made = json.loads((folder / "results.json").read_text())
    assert (folder / "plot.png").is_file()
    assert (made["prompts"], made["gamma"], made["calibration"]) == (3, 3, None)
    words = [s["words"] for s in made["settings"]]
    assert [f"tree.gamma={n}" for n in (1, 2, 3)] == words[:3]
    assert "tree.gamma=3 stop=confidence stop.threshold=0.4" in words
    assert not any("specdec_pp" in w for w in words)  # this run has no head
    rates = [b["tokens_per_s"]["value"] for b in made["best"]]
    assert rates == sorted(rates, reverse=True)
    for one in made["confirmed"]["settings"]:
        said, real = one["predicted"], one["measured"]["value"]
        assert one["ratio"]["value"] == pytest.approx(real / said)
        assert one["tau_ratio"]["value"] == pytest.approx(1.0)  # greedy: the texts that were traced
    assert len(made["confirmed"]["settings"]) == len(made["best"])
    (kept,) = (run / "tune").glob("trace-*.safetensors")
    shown = capsys.readouterr().err
    assert f"Best here: {made['best'][0]['words']}" in shown
    assert "off what was predicted" in shown
    # A second tuning reads the same trace.
    written = kept.stat().st_mtime_ns
    plan[2] = "tuning.confirm_prompts=0"
    assert decode(composed(*common, "tune=true", *plan)) == 0
    again = json.loads((run / "tune" / "heldout-T0-2" / "results.json").read_text())
    assert [s["tau"] for s in again["settings"]] == [s["tau"] for s in made["settings"]]
    assert kept.stat().st_mtime_ns == written
    # Predicted tokens per step are the decoder's own, and the learned rule now decodes.
    assert decode(composed(f"run={run}", "max_new_tokens=10", "limit=3", "tree.gamma=2")) == 0
    real = json.loads((run / "decode" / "heldout-chain2-T0" / "results.json").read_text())
    assert made["settings"][1]["tau"]["value"] == pytest.approx(real["tau"]["value"])
    assert decode(composed(*common[:3], "tree.gamma=3", "stop=spec_kv", "baseline=false")) == 0
    for wrong, sentence in (("stop=confidence", "tries all of them"), ("top_p=0.9", "top_p=0.9")):
        with pytest.raises(ValueError, match=sentence):
            decode(composed(*common, "tune=true", wrong))


def test_methods_without_training_stand_in_the_same_table(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = "baselines=[prompt_lookup,token_recycling]"
    common = [f"run={run}", "max_new_tokens=9", "limit=3", "tree.gamma=1", "dtype=float32"]
    assert decode(composed(*common, both, "baselines.token_recycling.nodes=9")) == 0
    shown = capsys.readouterr().err
    assert "prompt_lookup" in shown
    assert "token_recycling" in shown
    made = json.loads((run / "decode" / "heldout-chain1-T0" / "results.json").read_text())
    assert list(made["beside"]) == ["prompt_lookup", "token_recycling"]
    measured = made["beside"]["token_recycling"]["measured"]
    assert measured["shape"] == "recycling9"
    assert measured["prompts"] == made["prompts"] == 3
    with pytest.raises(ValueError, match="baselines, which learn"):
        decode(composed(*common, both, "replay=chains", "replay.gammas=[1]"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["verifier=typical"], "verifier.lossy=true"),
        (["verifier=greedy", "temperature=1"], "use verifier=sampling"),
        (["tree.gamma=9"], "set tree.gamma=3 or less"),
        (["tree.gamma=x"], "tree.gamma=x"),
        (["max_prompt_tokens=2"], "no prompt to measure on"),
    ],
)
def test_user_errors_are_one_sentence(run: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decode(composed(f"run={run}", *overrides))


def test_a_missing_run_is_a_sentence_and_status_2() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "decode", "run=nowhere"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert made.returncode == 2
    assert "not a finished run" in made.stderr
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize("tree", ["chain", "static"])
@pytest.mark.parametrize("verifier", ["greedy", "sampling", "typical"])
def test_every_tree_and_verifier_composes(tree: str, verifier: str) -> None:
    check(composed("run=x", f"tree={tree}", f"verifier={verifier}"), runtime=SUPPLIED)
