"""Curves laid over each other: the differences by hand, the picture, the refusals."""

import json
from pathlib import Path

import pytest

from scripts.curves import curves

ROWS = ["epoch,step,train/loss,val/loss", "0.1,1,2.0,", "0.2,2,1.5,", ",2,,1.75"]


def run(folder: Path, *rows: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_the_largest_difference_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run(tmp_path / "a" / "x", *ROWS)
    two = run(tmp_path / "b" / "x", ROWS[0], "0.1,1,2.25,", "0.2,2,1.0,", ",2,,1.5", "0.3,3,9.0,")
    out = tmp_path / "out" / "curves.png"
    found = curves([one, two], ["train/loss", "val/loss"], out)
    assert found == {"b/x": {"train/loss": 0.5, "val/loss": 0.25}}
    assert json.loads(out.with_suffix(".json").read_text()) == found
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "Largest difference from a/x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "is not a run folder with metrics"),
        (["epoch,step,train/loss", "0.1,1,2.0"], r"has no 'val/loss'; give numbers=\[...\] out of"),
        ([ROWS[0], "0.5,7,1.0,", ",7,,1.0"], "have no step with 'train/loss' in common"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, rows: list[str] | None, message: str) -> None:
    one = run(tmp_path / "a", *ROWS)
    other = tmp_path / "b" if rows is None else run(tmp_path / "b", *rows)
    with pytest.raises(ValueError, match=message):
        curves([one, other], ["train/loss", "val/loss"], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_run_twice(tmp_path: Path) -> None:
    one = run(tmp_path / "a", *ROWS)
    with pytest.raises(ValueError, match="names a folder twice"):
        curves([one, one], ["train/loss"], tmp_path / "x.png")
