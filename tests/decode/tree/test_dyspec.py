"""DySpec depth by depth against the paper's heap, and the law of its sampled trees."""

import heapq
from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import Tensor

from decode.tree import dyspec
from decode.tree.dynamic import Dynamic
from decode.tree.dyspec import DySpec, without_earlier
from decode.verifier.sampling import Sampling
from models.drafter.base import Tree
from tests.decode.enumerated import error_of, verified
from tests.decode.toy import Scripted, outcomes, tables
from tests.decode.tree.table import Path, Table, grown, paths_of, random_table

V = 5
Law = Callable[[Path], Tensor]
Order = Callable[[Path], list[int]]


def by_heap(
    q: Law, order: Order, *, nodes: int, depth: int, threshold: float, known: bool
) -> dict[Path, float]:
    """Algorithm 1 of the paper: pop a slot, draft there, push the next sibling's and the child's.

    `order` are the siblings below a path, one after another. `known`: a slot is worth what the node
    in it is worth, for drafts that are known beforehand.
    """
    ties = count()
    found: dict[Path, float] = {}
    heap: list[tuple[float, int, Path, int, float, float]] = []

    def push(path: Path, place: int, above: float, used: float) -> None:
        if len(path) < depth and place < len(order(path)):
            token = order(path)[place]
            value = above * (float(q(path)[token]) if known else 1.0 - used)
            heapq.heappush(heap, (-value, next(ties), path, place, above, used))

    push((), 0, 1.0, 0.0)
    while heap and len(found) < nodes - 1:
        value, _, path, place, above, used = heapq.heappop(heap)
        if -value <= threshold:
            break
        token = order(path)[place]
        found[(*path, token)] = -value
        mass = float(q(path)[token])
        push(path, place + 1, above, used + mass)
        push((*path, token), 0, above * mass, 0.0)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("nodes", "depth", "threshold"),
    [
        (2, 3, 0.0),
        (6, 9, 0.0),
        (20, 3, 0.0),
        (40, 6, 0.0),
        (40, 6, 0.05),
        (3, 9, 0.3),
        (99, 2, 0.0),
    ],
)
def test_best_tokens_are_the_heaps(seed: int, nodes: int, depth: int, threshold: float) -> None:
    q = random_table(seed, V)

    def order(path: Path) -> list[int]:
        return q(path).sort(descending=True).indices.tolist()

    expected = by_heap(q, order, nodes=nodes, depth=depth, threshold=threshold, known=True)
    drafter = Table(q, vocab=V)
    tree = grown(drafter, DySpec(nodes=nodes, depth=depth, threshold=threshold))
    assert set(paths_of(tree)[1:]) == set(expected)
    assert tree.q_NV is None
    assert drafter.steps <= depth


def test_it_is_eagle_2_without_a_frontier_limit() -> None:
    for seed in range(4):
        q = random_table(seed, V)
        free = grown(Table(q, vocab=V), DySpec(nodes=6, depth=7))
        wide = grown(Table(q, vocab=V), Dynamic(nodes=6, depth=7, top_k=V))
        assert set(paths_of(free)) == set(paths_of(wide))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("nodes", "depth", "threshold"),
    [(2, 3, 0.0), (6, 9, 0.0), (20, 3, 0.0), (40, 5, 0.0), (40, 6, 0.05), (3, 9, 0.3)],
)
def test_sampled_slots_are_the_heaps(
    seed: int, nodes: int, depth: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws at every node: those of some fixed ranks, one after another."""
    q = random_table(seed, V)
    ranks = torch.randperm(V, generator=torch.Generator().manual_seed(seed))

    def drawn(q_V: Tensor) -> Tensor:
        return q_V.sort(descending=True).indices[ranks]

    expected = by_heap(
        q,
        lambda path: drawn(q(path)).tolist(),
        nodes=nodes,
        depth=depth,
        threshold=threshold,
        known=False,
    )
    policy = DySpec(nodes=nodes, depth=depth, threshold=threshold, temperature=1.0)
    monkeypatch.setattr(
        policy, "_draw", lambda q_ND, count: torch.stack([drawn(q_V)[:count] for q_V in q_ND])
    )
    tree = grown(Table(q, vocab=V), policy)
    paths = paths_of(tree)
    assert set(paths[1:]) == set(expected)
    values = torch.cat(policy._slots).exp().sort(descending=True).values[: len(expected)]
    torch.testing.assert_close(values, torch.tensor(sorted(expected.values(), reverse=True)))
    check_rows(tree, q, paths)


def check_rows(tree: Tree, q: Law, paths: list[Path]) -> None:
    """Row i is q without the siblings drawn before node i, normalised."""
    assert tree.q_NV is not None
    assert not tree.replacement
    before: dict[Path, list[int]] = {}
    for node, path in enumerate(paths[1:], start=1):
        row_V = q(path[:-1]).clone()
        row_V[before.setdefault(path[:-1], [])] = 0.0
        row_V /= row_V.sum()
        torch.testing.assert_close(tree.q_NV[node], row_V)
        assert float(tree.draws_N[node]) == float(tree.q_NV[node, path[-1]])
        before[path[:-1]].append(path[-1])


@pytest.mark.parametrize(("nodes", "depth"), [(3, 2), (4, 2), (3, 1)])
def test_a_sampled_tree_keeps_the_law(
    nodes: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draw of every tree, every branch of its verification, in double precision."""
    p, q = tables(21, 3, depth), tables(22, 3, depth)
    assert error_of(p, depth + 1, law(p, q, nodes, depth, monkeypatch, in_order=False)) < 1e-12


def test_control_best_tokens_that_claim_to_be_drawn_are_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p, q = tables(21, 3, 1), tables(22, 3, 1)
    assert error_of(p, 2, law(p, q, 3, 1, monkeypatch, in_order=True)) > 1e-2


def law(
    p: dict[tuple, Tensor],
    q: dict[tuple, Tensor],
    nodes: int,
    depth: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    in_order: bool,
) -> dict[tuple, float]:
    """The law of a round's texts over all draws; `in_order` takes the best tokens instead."""
    monkeypatch.setattr(dyspec, "probabilities", lambda logits, **_: logits.softmax(-1))

    def grow(chance: Scripted) -> Tree:
        policy = DySpec(nodes=nodes, depth=depth, temperature=1.0)

        def draw(q_ND: Tensor, count: int) -> Tensor:
            if in_order:
                return q_ND.topk(count).indices
            drawn = []
            for _ in range(count):
                drawn.append(chance.draws(q_ND, 1))
                q_ND = q_ND.scatter(1, drawn[-1], 0.0)
                q_ND = q_ND / q_ND.sum(-1, keepdim=True)
            return torch.cat(drawn, dim=1)

        monkeypatch.setattr(policy, "_draw", draw)
        return grown(Table(lambda path: q[path], vocab=3), policy)

    found: dict[tuple, float] = {}
    for tree, weight in outcomes(grow):
        for text, bonus_V, probability in verified(tree, p, Sampling()):
            for token, last in enumerate(bonus_V):
                whole = (*text, token)
                found[whole] = found.get(whole, 0.0) + weight * probability * last
    return found


def test_draws_have_the_law_of_one_after_another() -> None:
    q_V = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    policy = DySpec(temperature=1.0, seed=3)
    drawn_NR = policy._draw(q_V.expand(8000, V), 2)
    counts_VV = torch.zeros(V, V)
    counts_VV.index_put_((drawn_NR[:, 0], drawn_NR[:, 1]), torch.ones(8000), accumulate=True)
    exact_VV = q_V[:, None] * q_V[None, :] / (1.0 - q_V)[:, None]
    exact_VV.fill_diagonal_(0.0)
    # 4 standard deviations of a cell of probability 0.3 are 0.0205.
    assert float((counts_VV / 8000 - exact_VV).abs().max()) < 0.0205


def test_a_draft_of_no_mass_is_not_drafted() -> None:
    sure = torch.tensor([0.7, 0.3, 0.0, 0.0, 0.0])
    tree = grown(Table(lambda path: sure, vocab=V), DySpec(nodes=9, depth=2, temperature=1.0))
    assert set(paths_of(tree)[1:]) <= {(a,) for a in (0, 1)} | {
        (a, b) for a in (0, 1) for b in (0, 1)
    }
    assert len(tree) == 7
    tree = grown(Table(lambda path: sure, vocab=V), DySpec(nodes=9, depth=2, temperature=0.0))
    assert len(tree) == 7


def test_rows_without_what_was_drawn_before() -> None:
    q_MD = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    drafts_MR = torch.tensor([[1, 0, 2]] * 3)
    rows = without_earlier(q_MD, drafts_MR, torch.tensor([0, 1, 2]))
    expected = torch.tensor([[0.5, 0.3, 0.2], [5 / 7, 0.0, 2 / 7], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(rows, expected)


def test_a_threshold_nobody_reaches_leaves_the_root() -> None:
    flat = torch.full((V,), 0.2)
    tree = grown(Table(lambda path: flat, vocab=V), DySpec(threshold=0.5))
    assert len(tree) == 1
    # Drawn ones: the first slot is reached for sure, the second with 0.8, the fifth with 0.2.
    tree = grown(Table(lambda path: flat, vocab=V), DySpec(threshold=0.5, temperature=1.0))
    assert tree.depths_N.tolist() == [0, 1, 1, 1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"tree\.nodes=1"):
        DySpec(nodes=1)
    with pytest.raises(ValueError, match=r"tree\.threshold=1"):
        DySpec(threshold=1.0)
