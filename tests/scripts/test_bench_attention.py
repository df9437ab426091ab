"""The bench of attention measures both ways, and leaves the faster one in use."""

from models import causal
from scripts.bench_attention import row


def test_both_ways_are_timed_and_near_exact() -> None:
    cells = row(150, (4, 2, 16), repeats=1)
    assert cells[0] == "150"
    times = [float(part) for cell in (cells[1], cells[3]) for part in cell.split("+")]
    assert all(t >= 0.0 for t in times)
    blocks, kernel = (float(cell.rstrip("%")) for cell in (cells[2], cells[4]))
    assert 0.0 < blocks < 2.0
    assert 0.0 < kernel < 2.0
    assert blocks != kernel, "one way was measured twice"
    assert causal.IN_BLOCKS
