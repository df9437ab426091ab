"""The optimal acceptance of siblings against maximum flows and the formula over all sets."""

from collections.abc import Iterable
from itertools import permutations, product

import networkx as nx
import pytest
import torch
from torch import Tensor

from decode.optimal import acceptance_bound, optimal_acceptance
from tests.decode.enumerated import distributions


def draws(q_V: Tensor, count: int, *, replacement: bool) -> Iterable[tuple[tuple, float]]:
    """Every sequence of drafts with its probability."""
    q, ids = q_V.tolist(), range(len(q_V))
    for drawn in product(ids, repeat=count) if replacement else permutations(ids, count):
        weight, gone = 1.0, 0.0
        for x in drawn:
            weight *= q[x] if replacement else q[x] / (1.0 - gone)
            gone += q[x]
        yield drawn, weight


def by_flow(p_V: Tensor, q_V: Tensor, count: int, *, replacement: bool) -> float:
    """The linear programme itself: mass flows from drafts to a next token that is one of them."""
    graph = nx.DiGraph()
    for drawn, weight in draws(q_V, count, replacement=replacement):
        graph.add_edge("drafts", drawn, capacity=weight)
        for x in set(drawn):
            graph.add_edge(drawn, x, capacity=1.0)
    for x, mass in enumerate(p_V.tolist()):
        graph.add_edge(x, "token", capacity=mass)
    return float(nx.maximum_flow_value(graph, "drafts", "token"))


def by_sets(p_V: Tensor, q_V: Tensor, count: int, *, replacement: bool) -> float:
    """1 + min over all sets H of P(H) - Q(H)."""
    known = list(draws(q_V, count, replacement=replacement))
    best = 0.0
    for chosen in range(2 ** len(p_V)):
        inside = {x for x in range(len(p_V)) if chosen >> x & 1}
        mass = sum(weight for drawn, weight in known if inside.issuperset(drawn))
        best = min(best, sum(float(p_V[x]) for x in inside) - mass)
    return 1.0 + best


def pair(seed: int, vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p_V, q_V = (torch.randn(vocab, generator=generator, dtype=torch.double) for _ in range(2))
    return (1.5 * p_V).softmax(-1), (1.5 * q_V).softmax(-1)


CASES = [(1, 5, 2), (2, 5, 2), (3, 5, 3), (4, 4, 3), (5, 6, 2), (6, 4, 1)]


@pytest.mark.parametrize(("seed", "vocab", "count"), CASES)
def test_independent_drafts_are_exact(seed: int, vocab: int, count: int) -> None:
    p_V, q_V = pair(seed, vocab)
    found = optimal_acceptance(p_V, q_V, count)
    assert found == pytest.approx(by_flow(p_V, q_V, count, replacement=True), abs=1e-9)
    assert found == pytest.approx(by_sets(p_V, q_V, count, replacement=True), abs=1e-12)
    if count == 1:
        assert found == pytest.approx(float(torch.minimum(p_V, q_V).sum()), abs=1e-12)


@pytest.mark.parametrize(("seed", "vocab", "count"), CASES)
def test_without_replacement_it_is_a_bound(seed: int, vocab: int, count: int) -> None:
    p_V, q_V = pair(seed, vocab)
    exact = by_flow(p_V, q_V, count, replacement=False)
    assert by_sets(p_V, q_V, count, replacement=False) == pytest.approx(exact, abs=1e-9)
    # 1e-3 is the error of the integral; on these toys the best set is among those looked at.
    assert acceptance_bound(p_V, q_V, count) == pytest.approx(exact, abs=1e-3)


def test_the_documented_toys() -> None:
    for (p_V, q_V), count, independent, without in zip(
        distributions([(5, 2), (5, 3)]), (2, 3), (0.814, 0.646), (0.842, 0.919), strict=True
    ):
        assert optimal_acceptance(p_V, q_V, count) == pytest.approx(independent, abs=5e-4)
        assert acceptance_bound(p_V, q_V, count) == pytest.approx(without, abs=1e-3)


def test_ends() -> None:
    p_V, q_V = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    assert optimal_acceptance(p_V, q_V, 3) == 0.0
    assert acceptance_bound(p_V, q_V, 2) == 0.0
    assert optimal_acceptance(p_V, p_V, 3) == pytest.approx(1.0)
    # Both ids of the nucleus are drafted whatever is drawn: all of p there is accepted.
    r_V = torch.tensor([0.3, 0.0, 0.4, 0.3])
    assert acceptance_bound(r_V, p_V, 2) == pytest.approx(0.3)


def test_a_real_vocabulary() -> None:
    """k drafts do better than one and no worse without replacement; one draft has the overlap."""
    torch.manual_seed(0)
    p_V = (torch.randn(49152) * 3).softmax(-1)
    q_V = (p_V.log() + torch.randn(49152)).softmax(-1)
    overlap = float(torch.minimum(p_V.double(), q_V.double()).sum())
    assert optimal_acceptance(p_V, q_V, 1) == pytest.approx(overlap, abs=1e-5)
    assert acceptance_bound(p_V, q_V, 1) == pytest.approx(overlap, abs=1e-3)
    assert optimal_acceptance(p_V, q_V, 3) > overlap + 0.02
    assert acceptance_bound(p_V, q_V, 3) > optimal_acceptance(p_V, q_V, 3) - 1e-3
