"""What every acceptance rule receives and returns.

Shape legend: N tree nodes, V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from decode.chance import Chance
from models.drafter.base import Tree

TargetLaw = Callable[[int], Tensor]
"""p(node): the target's distribution `[V]` of the token after this node, at the serving
temperature. Made only for the nodes a rule asks for."""


@dataclass(frozen=True)
class Verdict:
    """The accepted node path, root first (the root is known, so it always counts), and the token
    the target adds after the last accepted node (the bonus token)."""

    path: list[int]
    token: int


class Verifier(Protocol):
    """An acceptance rule.

    `lossy` rules change the target's distribution. `greedy_only` rules ignore p beyond its argmax,
    so they are exact at temperature 0 and nowhere else.
    """

    lossy: bool
    greedy_only: bool

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """Choose the path to keep and the token after it."""
        ...


def children_of(tree: Tree) -> list[list[int]]:
    """The children of every node, in the order they were drawn."""
    children: list[list[int]] = [[] for _ in range(len(tree))]
    for node, parent in enumerate(tree.parents_N.tolist()):
        if parent >= 0:
            children[parent].append(node)
    return children
