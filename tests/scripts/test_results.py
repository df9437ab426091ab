import json
from pathlib import Path

import pytest

from scripts.results import HEADER, main, table


def _run(root: Path, name: str) -> Path:
    run = root / "runs" / name / "20260101-000000"
    report = run / "decode" / "mt_bench-chain4-T0"
    report.mkdir(parents=True)
    facts = {
        "drafter": {"class": "Medusa", "parameters": 10_750_000},
        "results": {"train_seconds": 90.0},
    }
    (run / "run.json").write_text(json.dumps(facts))
    measured = {
        "bench": "mt_bench",
        "prompts": 80,
        "max_new_tokens": 64,
        "temperature": 0.0,
        "shape": "chain4",
        "tau": {"value": 1.504, "low": 1.4, "high": 1.6},
        "alpha_by_depth": [0.35, 0.251],
        "speedup": None,
        "draft_ms": 2.04,
        "target_ms": 45.0,
    }
    (report / "results.json").write_text(json.dumps(measured))
    return run


def test_one_row_for_every_report(tmp_path: Path) -> None:
    lines = table([_run(tmp_path, "a"), _run(tmp_path, "b")]).splitlines()
    assert lines[0].split(" | ")[0] == "| run"
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert len(cells) == len(HEADER)
    assert cells[:7] == ["a", "Medusa 10.8 M", "1.5 min", "mt_bench", "80 x 64", "0", "chain4"]
    assert cells[7:] == ["1.50 [1.40, 1.60]", "0.35 0.25", "", "2.0 + 45.0"]


def test_a_folder_without_a_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
