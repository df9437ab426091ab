"""Draft trees, and how they are grown.

Shape legend: N tree or frontier nodes, M children, S stepped nodes, d width of drafter states,
V target vocabulary, D draft vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.drafter.base import Drafter


@dataclass(frozen=True)
class Frontier:
    """The nodes of one depth of a draft tree, about to be extended.

    `tokens_N` are target-vocabulary ids. `parents_N` indexes the previous frontier; at depth 0 the
    only node is the root x_{t+1} and its parent is 0.
    """

    tokens_N: Tensor
    parents_N: Tensor


@dataclass(frozen=True)
class Tree:
    """Drafted tokens. Node 0 is the root x_{t+1}; every node comes after its parent.

    `parents_N[0]` is -1. `draws_N` is the probability each token was drawn with (1 for a
    deterministic choice such as top-k). `q_NV` is kept only when tokens were sampled: row i is the
    full draft distribution (target vocabulary) that node i was sampled from; row 0 is unused.
    `replacement` says how siblings were sampled: independently, or (False) one after another, each
    from what was left of q; their order in the tree is then the order of the draws.

    `stepped_S` lists the nodes that went through `Drafter.step`, in that order (the others are
    leaves nobody extended); -1 for those that `keep` has removed since.
    """

    tokens_N: Tensor
    parents_N: Tensor
    depths_N: Tensor
    draws_N: Tensor
    q_NV: Tensor | None = None
    replacement: bool = True
    stepped_S: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_N.shape[0]

    def keep(self, nodes_M: Tensor) -> "Tree":
        """The tree of these nodes alone: ascending, the root and every parent among them."""
        place_N = torch.full_like(self.parents_N, -1)
        place_N[nodes_M] = torch.arange(len(nodes_M), device=place_N.device)
        parents_M = self.parents_N[nodes_M]
        stepped_S = self.stepped_S
        kept = Tree(
            self.tokens_N[nodes_M],
            torch.where(parents_M < 0, parents_M, place_N[parents_M]),
            self.depths_N[nodes_M],
            self.draws_N[nodes_M],
            None if self.q_NV is None else self.q_NV[nodes_M],
            self.replacement,
            None if stepped_S is None else place_N[stepped_S],
        )
        assert int(nodes_M[0]) == 0 and bool((kept.parents_N[1:] >= 0).all()), "a parent is missing"
        return kept


class Policy(Protocol):
    """How a tree is grown: which children each node of a frontier gets (see decode/tree).

    Implementations are subclasses; one may keep what it needs of a draft from depth to depth, and
    begins anew at depth 0.
    """

    def begin(self, drafter: "Drafter") -> None:
        """A draft is about to be made. Nothing is done unless a policy tells the drafter how."""
        return

    def grow(
        self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: "Drafter"
    ) -> "Children | None":
        """Choose children of the frontier's nodes, or None to stop drafting here."""
        ...

    def look(self, states_Nd: Tensor) -> None:
        """The drafter's states that the next logits come from. Called before every `grow`; nothing
        is done unless a policy reads them."""
        return

    def finish(self, tree: Tree) -> Tree:
        """What is verified of the tree that was grown. All of it, unless a policy chooses."""
        return tree

    def verified(self, tested: int, accepted: int) -> None:
        """What became of the tree: depth k had a draft put to the test when k < tested, and one
        that passed when k < accepted. Nothing is done unless a policy learns from it."""
        return


@dataclass(frozen=True)
class Children:
    """Chosen children: `tokens` in target ids, `parents` in the frontier, and how they were drawn.

    `expand_M` marks the children that will themselves be extended (the next frontier).
    """

    tokens_M: Tensor
    parents_M: Tensor
    draws_M: Tensor
    expand_M: Tensor
    q_MV: Tensor | None = None
    replacement: bool = True
