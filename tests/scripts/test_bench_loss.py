"""The bench measures what it says."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scripts.bench_loss import Case, prepare
from scripts.loss_scaling import plot
from scripts.peak import measured

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@linux
def test_memory_beyond_what_is_returned() -> None:
    """64 MB used on the way to 16 MB of result: 64 MB, to a few per cent."""

    def once() -> list[Tensor]:
        used = torch.ones(16, 2**20)
        return [used[:4] + 1.0]

    found = measured(once, "cpu", 1)
    assert found["returned_mb"] == 16.0
    assert found["beyond_mb"] == pytest.approx(64.0, abs=6.0)
    assert 0 < found["processor_seconds"] < 10


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "float32"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_both_ways_measure_the_same_thing(head: str, precision: str) -> None:
    """The gradients that are timed agree between the ways."""

    def gradients(way: str) -> list[Tensor]:
        return prepare(
            Case(
                loss="lk_lambda",
                head=head,
                way=way,
                hidden=16,
                vocab=300,
                positions=40,
                precision=precision,
            )
        )()

    ours, theirs = gradients("chunked"), gradients("plain")
    assert len(ours) == (2 if head == "trained" else 1)
    limit = 1e-5 if precision == "float32" else 1e-2
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < limit


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    results = [
        {
            "head": head,
            "way": way,
            "hidden": 64,
            "vocab": vocab,
            "positions": positions,
            "beyond_mb": vocab * positions / 1e3,
            "processor_seconds": 1.0,
        }
        for head in ("frozen", "trained")
        for way in ("chunked", "plain")
        for vocab, positions in ((100, 10), (100, 20), (200, 20))
    ]
    assert json.dumps(results)
    plot(results, tmp_path / "images" / "scaling.png")
    assert (tmp_path / "images" / "scaling.png").read_bytes().startswith(b"\x89PNG")
