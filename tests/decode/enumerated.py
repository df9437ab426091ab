"""Whole rounds over tables of probabilities, for tests that enumerate every random branch.

Shape legend: N nodes, D vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decode.tree import sampled
from decode.tree.sampled import Sampled
from decode.verifier.base import Verifier
from models.drafter.base import Drafter, Frontier, Tree
from tests.decode.toy import Scripted, outcomes, results_error


def numpy_tables(seed: int, vocab: int, length: int, sharpness: float) -> dict[tuple, Tensor]:
    """Random distributions after every prefix, from numpy's generator: documented toys use them."""
    generator = np.random.default_rng(seed)
    found = {}
    for n in range(length + 1):
        for prefix in product(range(vocab), repeat=n):
            logits_V = torch.from_numpy(generator.normal(size=vocab) * sharpness)
            found[prefix] = logits_V.softmax(-1)
    return found


def distributions(sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """The documented toys of one node: p and q for each (vocabulary, number of siblings)."""
    generator = np.random.default_rng(0)
    return [
        (
            torch.from_numpy(generator.normal(size=vocab) * 1.5).softmax(-1),
            torch.from_numpy(generator.normal(size=vocab) * 1.5).softmax(-1),
        )
        for vocab, _ in sizes
    ]


class TableDrafter:
    """Drafts by a table: text -> q. The drafting state is the text of every frontier node.

    It has two exits: the first drafts from the reversed rows.
    """

    max_depth = None
    propose: Any = Drafter.propose
    exit_costs = (0.1, 0.3)
    leave_at: int | None = None

    def __init__(self, q: dict[tuple, Tensor]) -> None:
        self.q = q

    def step(
        self, state: list[tuple] | None, depth: int, frontier: Frontier
    ) -> tuple[list[tuple], Tensor]:
        texts: list[tuple] = [()]
        if depth > 0:
            assert state is not None
            rows = zip(frontier.parents_N.tolist(), frontier.tokens_N.tolist(), strict=True)
            texts = [(*state[parent], token) for parent, token in rows]
        rows_ND = torch.stack([self.q[text] for text in texts]).log()
        return texts, rows_ND.flip(-1) if self.leave_at == 0 else rows_ND

    def head(self, depth: int) -> Callable[[Tensor], Tensor]:
        return lambda states_ND: states_ND

    def to_target_ids(self, ids: Tensor) -> Tensor:
        return ids

    def full_distribution(self, q_ND: Tensor) -> Tensor:
        return q_ND


def grown(
    q: dict[tuple, Tensor], chance: Any, widths: list[int], *, replacement: bool, label: bool | None
) -> Tree:
    """The tree a `Sampled` policy grows with the given chance; `label` overrides what it says."""
    policy = Sampled(widths=widths, replacement=replacement, temperature=1.0)
    policy._chance = chance
    with pytest.MonkeyPatch.context() as patch:
        # In double precision, so that laws agree to 1e-12.
        patch.setattr(sampled, "probabilities", lambda logits, **_: logits.softmax(-1))
        tree = TableDrafter(q).propose(None, torch.tensor([0]), policy)
    if label is None:
        return tree
    return Tree(tree.tokens_N, tree.parents_N, tree.depths_N, tree.draws_N, tree.q_NV, label)


def texts_of(tree: Tree) -> list[tuple]:
    """The drafted tokens on the path to every node."""
    texts: list[tuple] = [()]
    for node in range(1, len(tree)):
        parent = int(tree.parents_N[node])
        texts.append((*texts[parent], int(tree.tokens_N[node])))
    return texts


class LastDraw(Scripted):
    """Keeps the law of the bonus token instead of branching on it: no rule draws anything else."""

    def draw(self, p_V: Tensor) -> int:
        self.law = p_V.tolist()
        return -1


def verified(
    tree: Tree, p: dict[tuple, Tensor], rule: Verifier
) -> Iterator[tuple[tuple, list[float], float]]:
    """Every outcome of one tree: accepted drafts, the law of the token after them, probability."""
    texts, parents = texts_of(tree), tree.parents_N.tolist()
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = LastDraw(scripts.pop())
        path = rule.verify(tree, lambda node: p[texts[node]], chance).path
        assert [parents[node] for node in path] == [-1, *path[:-1]]
        scripts += chance.alternatives
        yield texts[path[-1]], chance.law, chance.probability


def texts_law(
    p: dict[tuple, Tensor],
    q: dict[tuple, Tensor],
    widths: list[int],
    rule: Verifier,
    *,
    replacement: bool,
    label: bool | None = None,
) -> dict[tuple, float]:
    """The law of what a round produces (drafts and bonus): trees drawn from q, verified with p."""
    law: dict[tuple, float] = defaultdict(float)

    def grow(chance: Scripted) -> Tree:
        return grown(q, chance, widths, replacement=replacement, label=label)

    for tree, weight in outcomes(grow):
        for text, bonus_V, probability in verified(tree, p, rule):
            for token, last in enumerate(bonus_V):
                law[(*text, token)] += weight * probability * last
    return law


def mean_accepted(law: dict[tuple, float]) -> float:
    """Mean number of accepted drafts: the bonus token does not count."""
    return sum((len(text) - 1) * probability for text, probability in law.items())


def error_of(p: dict[tuple, Tensor], length: int, law: dict[tuple, float]) -> float:
    """Largest difference between the law of `length` tokens and the product of p."""
    return results_error(p, len(p[()]), length, law.items())
