"""Sequoia's choice against the paper's dynamic programme and against all trees there are."""

from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

from decode.tree.cost import Cost
from decode.tree.sequoia import Sequoia, candidates, fastest_tree
from decode.tree.static import StaticTree, TreeShape, best_tree
from models.target import Target
from tests.decode.toy import echo

ACCURACIES = [
    [[0.5, 0.3], [0.4, 0.2], [0.3, 0.1]],
    [[0.9, 0.05, 0.01], [0.8, 0.1, 0.05], [0.7, 0.1, 0.1]],
    [[0.3, 0.25, 0.2], [0.6, 0.1, 0.1]],
]
FLAT = Cost(target_ms={1: 7.0}, draft_ms=[{1: 0.0}])


def programme(accuracy: list[list[float]], nodes: int, depth: int) -> float:
    """T of the paper: the most expected tokens of a tree with at most this many nodes and depths.

    children(d, m, l, b): a node at depth d whose subtree has at most m nodes and l depths, and
    whose first b children may be used; the b-th one takes m - y nodes.
    """

    @cache
    def children(d: int, m: int, limit: int, b: int) -> float:
        if b == 0 or limit == 0:
            return 1.0
        best = children(d, m, limit, b - 1)
        for y in range(1, m):
            below = children(d + 1, m - y, limit - 1, ranks(d + 1))
            best = max(best, children(d, y, limit, b - 1) + accuracy[d][b - 1] * below)
        return best

    def ranks(d: int) -> int:
        return len(accuracy[d]) if d < len(accuracy) else 0

    return children(0, nodes, depth, ranks(0))


def every_tree(accuracy: list[list[float]], nodes: int) -> list[TreeShape]:
    """All trees of 2 to `nodes` nodes over the ranks there are."""
    everything: list[tuple[int, ...]] = [()]
    for depth in range(len(accuracy)):
        above = [path for path in everything if len(path) == depth]
        everything += [(*path, r) for path in above for r in range(len(accuracy[depth]))]
    return [
        TreeShape(chosen)
        for size in range(1, nodes)
        for chosen in combinations(everything[1:], size)
        if all(path[:-1] in {(), *chosen} for path in chosen)
    ]


@pytest.mark.parametrize("accuracy", ACCURACIES)
@pytest.mark.parametrize("nodes", [2, 3, 5, 8, 13])
def test_the_best_tree_of_a_size_and_depth_is_the_programmes(
    accuracy: list[list[float]], nodes: int
) -> None:
    for depth in range(1, len(accuracy) + 1):
        ours = best_tree(accuracy[:depth], nodes).expected_tau(accuracy)
        assert ours == pytest.approx(programme(accuracy, nodes, depth), abs=1e-12)


def test_the_programme_by_hand() -> None:
    # Root, its two children, and one grandchild: 1 + .5 + .3 + .5 * .4, or a chain of three.
    assert programme(ACCURACIES[0], 4, 3) == pytest.approx(2.0)
    assert programme(ACCURACIES[0], 4, 1) == pytest.approx(1.8)


@pytest.mark.parametrize("accuracy", ACCURACIES)
@pytest.mark.parametrize(
    ("target_ms", "draft_ms"),
    [
        ({1: 10.0}, 0.0),
        ({1: 10.0}, 3.0),
        ({1: 10.0, 5: 20.0}, 0.0),
        ({1: 10.0, 3: 10.5, 5: 16.0}, 1.0),
        ({1: 1.0, 5: 5.0}, 0.5),
    ],
)
def test_it_is_the_fastest_of_all_trees(
    accuracy: list[list[float]], target_ms: dict[int, float], draft_ms: float
) -> None:
    """Where a step costs the same on any number of nodes."""
    cost = Cost(target_ms=target_ms, draft_ms=[{1: draft_ms}], round_ms=0.7)
    chosen = fastest_tree(accuracy, cost, 5)
    speed = chosen.expected_tau(accuracy) / cost.of(chosen)
    fastest = max(t.expected_tau(accuracy) / cost.of(t) for t in every_tree(accuracy, 5))
    assert speed == pytest.approx(fastest)


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_when_time_is_flat_it_is_the_largest_best_tree(accuracy: list[list[float]]) -> None:
    chosen = fastest_tree(accuracy, FLAT, 9)
    assert chosen.nodes == 9
    assert chosen.expected_tau(accuracy) == best_tree(accuracy, 9).expected_tau(accuracy)


def test_what_costs_decides() -> None:
    accuracy = ACCURACIES[1]
    dear_nodes = Cost(target_ms={1: 1.0, 2: 2.0, 3: 3.0}, draft_ms=[{1: 0.0}])
    assert fastest_tree(accuracy, dear_nodes, 9).nodes == 2
    dear_steps = Cost(target_ms={1: 10.0}, draft_ms=[{1: 50.0}])
    assert fastest_tree(accuracy, dear_steps, 9).depth == 1
    wide_steps = Cost(target_ms={1: 10.0}, draft_ms=[{1: 0.0, 2: 1000.0}])
    extended = {path[:-1] for path in fastest_tree(accuracy, wide_steps, 9).paths}
    assert all(sum(len(path) == depth for path in extended) <= 1 for depth in (1, 2))


def test_candidates_have_the_size_and_depth_they_stand_for() -> None:
    found = [(shape.nodes, shape.depth) for shape in candidates(ACCURACIES[0], 5)]
    # Paths are worth .5 and .3, then .2, .12, .1, ...: what may be deeper need not be.
    assert found == [(2, 1), (3, 1), (4, 2), (5, 2)]


@torch.no_grad()
def test_it_drafts_as_the_static_tree_of_its_shape(target: Target) -> None:
    drafter, accuracy = echo(target), ACCURACIES[0]
    cost = Cost(target_ms={1: 10.0, 6: 20.0}, draft_ms=[{1: 0.1}])
    policy = Sequoia(nodes=9, cost=cost, accuracy_KR=accuracy, target=target, drafter=drafter)
    assert policy.expected_ms == pytest.approx(cost.of(policy.shape))
    assert policy.name == f"sequoia{policy.shape.nodes}-{policy.shape.depth}"
    same = StaticTree(nodes=policy.shape.nodes, accuracy_KR=accuracy[: policy.shape.depth])
    assert policy.shape == same.shape
    prompt = torch.tensor([[5, 9, 17]])
    state = drafter.start(target.forward(prompt[:, :2]), prompt)
    ours = drafter.propose(state, prompt[0, -1:], policy)
    theirs = drafter.propose(state, prompt[0, -1:], same)
    assert torch.equal(ours.tokens_N, theirs.tokens_N)
    assert torch.equal(ours.parents_N, theirs.parents_N)


def test_a_drafter_that_was_never_right_drafts_nothing(target: Target) -> None:
    policy = Sequoia(cost=FLAT, accuracy_KR=[[0.0, 0.0]] * 2, target=target, drafter=echo(target))
    assert policy.shape.nodes == 1


def test_refusals(target: Target, tmp_path: Path) -> None:
    drafter = echo(target)
    with pytest.raises(ValueError, match=r"tree=sequoia needs the run's rank_accuracy\.json"):
        Sequoia(accuracy_KR=None, target=target, drafter=drafter, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"tree\.nodes=1"):
        Sequoia(nodes=1, cost=FLAT, accuracy_KR=ACCURACIES[0], target=target, drafter=drafter)
