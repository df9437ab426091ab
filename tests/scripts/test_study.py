"""The grid on a tiny target: two cells, four panels, and every row's command."""

import csv
import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from conf.check import check
from decode.__main__ import SUPPLIED, decode
from decode.interval import Estimate
from scripts.study import Plan, _check_same, _flat, study
from scripts.study_report import START, Cell, Panel, Score, markdown
from tests.train.conftest import Recipe
from train.run import SUPPLIED as TRAIN_SUPPLIED


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base=None):
        return compose(command, overrides=list(overrides))


def read(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_default_grid_is_complete() -> None:
    """Seven losses, four kinds of data; each composes and checks as a training run."""
    cfg = composed("study", "start=x")
    check(cfg, runtime=SUPPLIED)
    assert len(cfg.losses) * len(cfg.data) == 28
    experiment = f"+experiment={cfg.experiment}"
    for loss in cfg.losses:
        check(composed("train", experiment, f"loss={loss}"), runtime=TRAIN_SUPPLIED)
    fractions = {}
    for data, arguments in cfg.data.items():
        config = composed("train", experiment, *arguments)
        check(config, runtime=TRAIN_SUPPLIED)
        fractions[data] = config.onpolicy.fraction
    assert fractions == {"fixed": 0.0, "target": 0.0, "on_policy": 1.0, "mixed": 0.5}


@pytest.mark.slow
def test_two_cells_from_start_to_table(
    tmp_path: Path, target_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(tmp_path, target_dir)
    common = [o for o in recipe.overrides if not o.startswith("final_decode")]
    recipe.overrides = common  # the experiment decodes nothing at the end
    start = recipe.run(Path("runs/start/1"), "+experiment=small_lm_study")
    prompts = tmp_path / "asked.jsonl"
    lines = [json.dumps({"prompt": f"the dog {i}"}) for i in range(5)]
    prompts.write_text("\n".join(lines) + "\n")

    def settings(*more: str, steps: int = 2) -> DictConfig:
        return composed(
            "study",
            f"start={start}",
            "losses=[forward_kl,tvd]",
            "~data.fixed",
            "~data.mixed",
            "~data.target",
            "data.on_policy=['onpolicy.fraction=1.0','onpolicy.max_new_tokens=8']",
            "heldout=on_policy",
            "overrides=" + json.dumps([*common, f"trainer.max_steps={steps}"]),
            "bench@out_of_domain=file",
            f"out_of_domain.sources.0.path={prompts}",
            "max_new_tokens=10",
            "gamma=2",
            "gammas=[1,2,4]",
            "samples=2",
            *more,
        )

    assert study(settings()) == 0
    out = Path("runs/study")
    rows = read(out)
    assert [(r["loss"], r["bench"], r["T"]) for r in rows[:3]] == [
        (START, "heldout", "0.0"),
        ("forward_kl", "heldout", "0.0"),
        ("tvd", "heldout", "0.0"),
    ]
    assert len(rows) == 3 * 4
    for row in rows:
        if row["loss"] == START:
            assert float(row["gain"]) == float(row["gain_low"]) == float(row["gain_high"]) == 1.0
        assert 1.0 <= float(row["tau"]) <= 3.0
        assert float(row["mbsu"]) <= float(row["best_mbsu"])
    assert rows[1]["tau"] != rows[0]["tau"] or rows[4]["tau"] != rows[3]["tau"]
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")

    # The command beside a row gives the numbers of the row.
    row = rows[5]
    assert (row["loss"], row["T"], row["samples"]) == ("tvd", "1.0", "2")
    command = shlex.split(row["decode_command"])
    assert command[:3] == ["python", "-m", "decode"]
    assert decode(composed("decode", *command[3:])) == 0
    (report,) = Path(row["run"]).glob("replay/*/results.json")
    alone = json.loads(report.read_text())
    assert f"{alone['chains'][0]['tau']['value']:.4f}" == row["tau"]
    assert f"{alone['acceptance']['low']:.4f}" == row["acceptance_low"]
    assert f"{alone['chains'][0]['mbsu']:.4f}" == row["mbsu"]
    assert "hydra.run.dir=runs/study/tvd-on_policy-seed0" in shlex.split(row["train_command"])

    # Again: nothing is trained, and the table is the same.
    before = (out / "table.csv").read_text()
    logs = {log: log.read_text() for log in (out / "logs").iterdir()}
    assert study(settings()) == 0
    assert (out / "table.csv").read_text() == before
    assert {log: log.read_text() for log in (out / "logs").iterdir()} == logs

    with pytest.raises(ValueError, match=r"begun with other settings \(trainer.max_steps: 2 then"):
        study(settings(steps=3))

    # A cell that was interrupted is continued; meanwhile the table leaves it out.
    facts = Path("runs/study/tvd-on_policy-seed0/run.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"finished": False}))
    assert study(settings("train=false")) == 1
    assert len(read(out)) == 2 * 4
    assert study(settings()) == 0
    log = (out / "logs" / "tvd-on_policy-seed0.log").read_text()
    assert "$ python -m train resume=runs/study/tvd-on_policy-seed0" in log
    assert len(read(out)) == 3 * 4


def test_settings_are_compared_by_what_they_say(tmp_path: Path) -> None:
    assert _flat({"a": {"b": None, "c": [1, {"d": 2}]}}) == {"a.c.0": 1, "a.c.1.d": 2}
    folder = tmp_path / "cell"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\nmix: null\n")
    plan = Plan("x", "y", folder, ["seed=0"], DictConfig({"seed": 0, "new": None}))
    _check_same(plan)
    assert plan.command == ["python", "-m", "train", f"resume={folder}"]
    with pytest.raises(ValueError, match="seed: 0 then, 1 now"):
        _check_same(Plan("x", "y", folder, [], DictConfig({"seed": 1})))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("gamma=9", "should be one of gammas"),
        ("heldout=nobody", "should name a kind of data"),
        ("start=nowhere", "start=nowhere"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        study(composed("study", "start=x", override))


def test_the_table_marks_the_best_of_each_panel() -> None:
    def score(tau: float) -> Score:
        one = Estimate(tau, tau - 0.1, tau + 0.1)
        return Score(one, one, one, [0.5], 1.0, 2, 1.5, "")

    cells = [
        Cell(None, None, None, Path("d"), "", {}),
        Cell("tvd", "mixed", Path("r"), Path("r/drafter"), "", {}),
    ]
    panel = Panel("set", 1.0, 4, 2, 1234, [score(1.5), score(1.75)])
    text = markdown(cells, [panel], gamma=3, longest=8, seed=0)
    assert "### set, T=1 (4 prompts x 2 answers, 1,234 tokens)" in text
    assert "| (before) |  | 1.50 [1.40, 1.60] |  |" in text
    assert "| tvd | mixed | **1.75 [1.65, 1.85]** | 1.75 [1.65, 1.85] |" in text
    assert "with a chain of 3 drafts" in text
