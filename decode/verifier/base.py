"""What every acceptance rule receives and returns.

Shape legend: N tree nodes, V target vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
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


def check_draws(tree: Tree) -> None:
    """Fail unless the rows of q are what `tree.replacement` says siblings were drawn from.

    Without replacement a sibling's row has nothing left of the siblings before it; with it, all
    rows of siblings are one and the same. A rule fed the wrong rows would not keep the law of the
    target, and nothing would show it.
    """
    if tree.q_NV is None or len(tree) < 3:
        return
    parents_N = tree.parents_N
    # later[i, j]: j is a sibling drawn before i. row[i, j]: q of node i at the token of node j.
    later_NN = (parents_N[:, None] == parents_N[None, :]).tril(-1)
    row_NN = tree.q_NV[:, tree.tokens_N]
    drawn_N = row_NN.diagonal()
    wrong_NN = row_NN != drawn_N[None, :] if tree.replacement else row_NN != 0.0
    assert not bool((later_NN & wrong_NN).any()), (
        f"siblings are said to be drawn with replacement={tree.replacement}, but their rows of q "
        "are not those of such draws"
    )


def draft_row(tree: Tree, node: int, like_V: Tensor) -> Tensor:
    """The law a node was drawn from: its row of q, or one-hot at its token when it was chosen."""
    if tree.q_NV is not None:
        return tree.q_NV[node]
    one_V = torch.zeros_like(like_V)
    one_V[tree.tokens_N[node]] = 1.0
    return one_V


def excess(p_V: Tensor, q_V: Tensor, weight: float) -> tuple[Tensor, float]:
    """norm((a p - q)+), the law after a rejected draft, and S / (S + 1 - a), S the mass before.

    a is the chance that the text before the draft may still be kept, 1 in token-level rules.
    """
    left_V = (weight * p_V - q_V).clamp_(min=0.0)
    total = float(left_V.sum())
    if total <= 0.0:
        # p = q with a = 1, where rejection has probability 0 up to rounding; or a = 0.
        return p_V, float(weight >= 1.0)
    return left_V.div_(total), total / (total + (1.0 - weight))
