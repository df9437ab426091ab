"""`python -m export` as a user runs it, on a tiny run folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.check import check_export
from models.drafter.medusa import Medusa
from models.target import Target
from tests.export.tiny_run import write_run

ROOT = Path(__file__).parents[2]
HEAD = {"_target_": "models.head.own.OwnHead"}


@pytest.fixture(scope="module")
def run(target: Target, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: config, facts, drafter, validation shards and one measurement."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    drafter = Medusa(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, num_heads=2, head=HEAD
    ).bind(target)
    drafter.init_from(target)
    node = {"_target_": "models.drafter.medusa.Medusa", "num_heads": 2, "head": HEAD}
    write_run(folder, drafter=drafter, node=node, target=target, target_dir=target_dir)
    results = folder / "decode" / "words-chain2-T0" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text(
        json.dumps(
            {
                "bench": "words",
                "prompts": 7,
                "temperature": 0.0,
                "lossy": False,
                "shape": "chain2",
                "tau": {"value": 1.6789, "low": 1.6, "high": 1.75},
                "alpha_by_depth": [0.5, 0.25],
                "speedup": {"value": 1.23, "low": 1.2, "high": 1.3},
                "dtype": "float32",
                "device": "cpu",
            }
        )
    )
    return folder


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "export", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("exporter", ["hf", "vllm"])
def test_export_writes_validates_proves_and_describes(run: Path, exporter: str) -> None:
    done = command(f"run={run}", f"exporter={exporter}", "texts=2")
    assert done.returncode == 0, done.stderr
    folder = run / "export" / exporter
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "parity.json",
    }
    assert json.loads((folder / "parity.json").read_text()) == {
        "proof": {"texts": 2, "chains": 32, "tokens": 64},
        "figures": {},
        "served": None,
    }
    assert not list(run.glob("export/.exporting-*"))
    # Two texts, 16 cuts each, two heads.
    assert "64 drafted tokens in 32 greedy chains over 2 texts" in " ".join(done.stderr.split())
    card = (folder / "README.md").read_text()
    assert "writes no text by itself" in card
    for part in (
        "Medusa drafter",
        "d41d8cd9",
        "abc123",
        "**1.68** [1.60, 1.75]",
        "0.50 0.25",
        "1.23x",
        "bonus token included",
        "64 drafted tokens",
        "num_heads: 2",
    ):
        assert part in card, part
    assert "base_model" not in card  # the target is a local folder
    assert check_export(folder) == {"hf": "hf", "vllm": "medusa"}[exporter]

    again = command(f"run={run}", f"exporter={exporter}")
    assert again.returncode == 2
    assert "exists already and an export overwrites nothing" in " ".join(again.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "There is no run to export"),
        (("run=nowhere",), "'nowhere' is not a finished run"),
        (("run=x", "exporter.dtype=int8"), "should be 'float32', 'bfloat16' or 'float16'"),
        (("run=x", "exporter=sglong"), "Could not find 'exporter/sglong'"),
        (("check=nowhere",), "has no config.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_non_zero_exit(
    arguments: tuple[str, ...], sentence: str
) -> None:
    done = command(*arguments)
    assert done.returncode in (1, 2)
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
