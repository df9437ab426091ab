"""The command, in this process: `python -m data_prep` is this function."""

import sys

import pytest

from data_prep.__main__ import main
from data_prep.manifest import read_manifest
from tests.data_prep.common import write_questions


@pytest.fixture
def run(target_dir, tmp_path, monkeypatch, capsys):
    questions = write_questions(tmp_path)

    def command(*words: str) -> tuple[int, str]:
        sources = f"[{{_target_: data_prep.source.files.Files, path: '{questions}'}}]"
        fixed = [
            "dataset=tiny",
            f"dataset.root={tmp_path}/out",
            f"dataset.sources={sources}",
            f"target.name={target_dir}",
            "target.dtype=float32",
            f"hydra.run.dir={tmp_path}/run",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
        monkeypatch.setattr(sys, "argv", ["data_prep", *fixed, *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, " ".join(capsys.readouterr().err.split())

    return command


def test_estimate_writes_nothing(run, tmp_path):
    code, said = run("estimate=true")
    assert code == 0
    assert "14 prompts with" in said
    assert "at most 168 answer tokens" in said
    assert "hours" in said
    assert not (tmp_path / "out").exists()


def test_show_prepares_examines_and_prints(run, tmp_path):
    code, said = run("show=2")
    assert code == 0
    assert "1. prompts: 14, of which 4 are held out." in said
    assert said.count("--- questions/") == 4
    assert "<|im_start|>assistant" in said
    assert "No example has a wrong mask." in said
    assert read_manifest(tmp_path / "out/tiny")["splits"]["train"]["examples"] == 10


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("+dataset.holdut=3", "did you mean 'holdout'"),
        ("dataset.holdout=many", "dataset.holdout=many"),
        ("dataset.respond.turn=middle", "'first' or 'last'"),
        ("dataset.sources.0.path=/no/such/file.jsonl", "is not a file"),
        ("dataset.holdout=99", "holdout=99 would leave none"),
        ("target.name=./nothing", "looks like a folder"),
    ],
)
def test_errors_are_one_sentence(run, word, sentence):
    code, said = run(word)
    assert code == 2
    assert "error:" in said
    assert sentence in said
    assert "Traceback" not in said
