"""EAGLE-2's tree against its description, written once more with paths and dictionaries."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from decode.tree.dynamic import Dynamic
from decode.tree.ranked import best_first, ranked
from tests.decode.tree.table import Path, Table, grown, paths_of, random_table

V = 5
Law = Callable[[Path], Tensor]


def by_hand(q: Law, *, nodes: int, depth: int, top_k: int) -> set[Path]:
    """Every frontier node expanded, every child a candidate, no step spared."""
    scores: dict[Path, float] = {}
    frontier: dict[Path, float] = {(): 0.0}
    for _ in range(depth):
        level: dict[Path, float] = {}
        for path, score in frontier.items():
            best = sorted(range(V), key=lambda token: -float(q(path)[token]))[:top_k]
            level |= {(*path, token): score + math.log(float(q(path)[token])) for token in best}
        scores |= level
        kept = sorted(level, key=lambda path: -level[path])[:top_k]
        frontier = {path: level[path] for path in level if path in kept}
    return set(sorted(scores, key=lambda path: -scores[path])[: nodes - 1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("nodes", "depth", "top_k"),
    [(2, 3, 2), (8, 1, 3), (9, 3, 2), (14, 4, 3), (60, 3, 5), (25, 5, 4)],
)
def test_it_is_the_tree_of_the_description(seed: int, nodes: int, depth: int, top_k: int) -> None:
    q = random_table(seed, V)
    tree = grown(Table(q, vocab=V), Dynamic(nodes=nodes, depth=depth, top_k=top_k))
    paths = paths_of(tree)
    expected = by_hand(q, nodes=nodes, depth=depth, top_k=top_k)
    assert set(paths[1:]) == expected
    assert len(tree) == min(nodes, 1 + len(expected))
    assert tree.q_NV is None


@pytest.mark.parametrize("nodes", [4, 10, 20, 31])
def test_where_no_frontier_is_cut_it_is_the_best_of_all_paths(nodes: int) -> None:
    q = random_table(11, V)
    everything = [path for n in (1, 2) for path in product(range(V), repeat=n)]

    def score(path: Path) -> float:
        return sum(math.log(float(q(path[:i])[token])) for i, token in enumerate(path))

    best = sorted(everything, key=score, reverse=True)[: nodes - 1]
    tree = grown(Table(q, vocab=V), Dynamic(nodes=nodes, depth=2, top_k=V))
    assert set(paths_of(tree)[1:]) == set(best)


def test_a_sure_drafter_makes_a_chain_and_an_unsure_one_a_fan() -> None:
    sure = torch.tensor([0.96, 0.02, 0.01, 0.005, 0.005])
    tree = grown(Table(lambda path: sure, vocab=V), Dynamic(nodes=6, depth=5, top_k=3))
    assert paths_of(tree) == [(0,) * n for n in range(6)]
    flat = torch.tensor([0.24, 0.2, 0.19, 0.19, 0.18])
    tree = grown(Table(lambda path: flat, vocab=V), Dynamic(nodes=6, depth=5, top_k=5))
    assert paths_of(tree) == [(), (0,), (1,), (2,), (3,), (4,)]


@pytest.mark.parametrize("nodes", [2, 3, 4, 7])
def test_equal_scores_keep_their_parents(nodes: int) -> None:
    """log q = 0: a child scores exactly what its parent does, and the earlier one stays."""
    one = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    tree = grown(Table(lambda path: one, vocab=V), Dynamic(nodes=nodes, depth=6, top_k=4))
    assert paths_of(tree) == [(0,) * n for n in range(nodes)]


def test_depth_is_the_longest_path_and_the_number_of_steps() -> None:
    sure = torch.tensor([0.96, 0.02, 0.01, 0.005, 0.005])
    drafter = Table(lambda path: sure, vocab=V)
    tree = grown(drafter, Dynamic(nodes=60, depth=4, top_k=3))
    assert (int(tree.depths_N.max()), drafter.steps) == (4, 4)
    # A drafter with fewer depths ends the tree; it is not an error.
    short = Table(lambda path: sure, vocab=V, limit=2)
    tree = grown(short, Dynamic(nodes=60, depth=4, top_k=3))
    assert (int(tree.depths_N.max()), short.steps) == (2, 2)
    assert set(paths_of(tree)[1:]) == {(a,) for a in range(3)} | {
        (a, b) for a in range(3) for b in range(3)
    }


def test_nodes_that_cannot_come_back_are_not_extended() -> None:
    flat = torch.full((V,), 0.2)
    drafter = Table(lambda path: flat, vocab=V)
    tree = grown(drafter, Dynamic(nodes=4, depth=6, top_k=5))
    assert tree.depths_N.tolist() == [0, 1, 1, 1]
    # Five children, three of them worth a step; what that step gave was worth none.
    assert (drafter.steps, drafter.rows) == (2, 4)


def test_steps_are_listed_for_the_nodes_that_stay() -> None:
    q = random_table(3, V)
    tree = grown(Table(q, vocab=V), Dynamic(nodes=7, depth=4, top_k=3))
    assert tree.stepped_S is not None
    stepped = [node for node in tree.stepped_S.tolist() if node >= 0]
    parents = set(tree.parents_N[1:].tolist())
    assert parents <= set(stepped)


def test_a_policy_may_be_used_again() -> None:
    policy = Dynamic(nodes=9, depth=3, top_k=3)
    first, second = random_table(1, V), random_table(2, V)
    alone = paths_of(grown(Table(second, vocab=V), Dynamic(nodes=9, depth=3, top_k=3)))
    grown(Table(first, vocab=V), policy)
    assert paths_of(grown(Table(second, vocab=V), policy)) == alone


def test_scores_never_rise() -> None:
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)) * 30
    for sharp in (logits, logits.bfloat16(), torch.nn.functional.one_hot(torch.arange(9)) * 1e4):
        log_q_NR, drafted_NR = ranked(sharp, 4)
        assert bool((log_q_NR <= 0).all())
        expected = sharp.float().log_softmax(-1).gather(-1, drafted_NR)
        torch.testing.assert_close(log_q_NR, expected)
    assert best_first(torch.tensor([1.0, 3.0, 1.0, 3.0]), 3).tolist() == [1, 3, 0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"tree\.nodes=1"):
        Dynamic(nodes=1)
    with pytest.raises(ValueError, match=r"tree\.depth=0"):
        Dynamic(depth=0)
    drafter = Table(random_table(0, V), vocab=V)
    with pytest.raises(ValueError, match=r"tree\.top_k=6 .* \(5\)"):
        grown(drafter, Dynamic(top_k=6))
