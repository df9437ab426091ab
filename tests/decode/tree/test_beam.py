import math

import pytest

from decode.tree.beam import Beam
from tests.decode.tree.table import Path, Table, grown, paths_of, random_table

V = 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "depth"), [(1, 3), (2, 4), (4, 2), (5, 3)])
def test_every_depth_is_beam_search(seed: int, width: int, depth: int) -> None:
    q = random_table(seed, V)
    found = paths_of(grown(Table(q, vocab=V), Beam(width=width, depth=depth)))
    beam: dict[Path, float] = {(): 0.0}
    expected: set[Path] = {()}
    for _ in range(depth):
        below = {
            (*path, token): score + math.log(float(q(path)[token]))
            for path, score in beam.items()
            for token in range(V)
        }
        kept = sorted(below, key=lambda path: -below[path])[:width]
        beam = {path: below[path] for path in kept}
        expected |= set(kept)
    assert set(found) == expected
    assert len(found) == 1 + width * depth


def test_a_drafter_with_fewer_depths_ends_the_tree() -> None:
    drafter = Table(random_table(0, V), vocab=V, limit=2)
    tree = grown(drafter, Beam(width=3, depth=6))
    assert tree.depths_N.tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert drafter.steps == 2
    drafter = Table(random_table(0, V), vocab=V)
    grown(drafter, Beam(width=3, depth=4))
    assert drafter.rows == 1 + 3 * 3  # the last depth is not extended


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"tree\.width=0"):
        Beam(width=0)
    with pytest.raises(ValueError, match=r"tree\.width=6 .* \(5\)"):
        grown(Table(random_table(0, V), vocab=V), Beam(width=6))
    assert Beam(width=3, depth=2).name == "beam3x2"
