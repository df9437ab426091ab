"""Token Recycling (Luo et al., 2024, arXiv 2408.08696).

Shape legend: N tree nodes or rows, T positions, K successors kept, V target vocabulary.
"""

import torch
from torch import Tensor

from decode.baselines.base import Baseline
from decode.tree.static import best_tree
from models.target import Features, Target
from models.tree import Policy, Tree

ROWS = 256
"""Rows of a prompt whose logits exist at once."""
FIRST, FALL = 0.24, 2.7
"""Chance that the best successor kept is right, and the power its rank falls with."""


class TokenRecycling(Baseline):
    """A matrix M of the target's last K best successors of every token, walked breadth first.

        read     M[x] <- the K largest logits of the target behind x, for every token x it reads:
                 the prompt, and all nodes of a draft tree, accepted or not
        draft    children of a node with token x: M[x, 0], M[x, 1], ... by a static tree

    V x K ids (1.5 MB for 49,152 tokens). The matrix is kept from prompt to prompt, as published:
    later prompts gain from earlier ones, so the order matters; `keep=false` begins each prompt with
    nothing. Where a token stands at several nodes the last one in the tree counts.

    Deviations: a token that the target has not read yet has no children, where the released code
    drafts token 0. The tree is the best one for rank accuracies that fall like a power, of any
    size, where the paper lists one: by depth 8, 23, 25, 17, 6 and 1 drafts instead of 8, 21, 25,
    15, 8 and 3; along recorded answers the two gave 1.624 and 1.622 tokens per step.
    """

    def __init__(
        self,
        *,
        nodes: int = 81,
        depth: int = 6,
        successors: int = 8,
        keep: bool = True,
    ) -> None:
        super().__init__()
        self.successors = successors
        self.keep = keep
        accuracy_K = [FIRST * (rank + 1) ** -FALL for rank in range(successors)]
        self.shape = best_tree([accuracy_K] * depth, nodes)
        place = {path: node for node, path in enumerate([(), *self.shape.paths])}
        self._parents_N = torch.tensor([-1, *(place[path[:-1]] for path in self.shape.paths)])
        self._ranks_N = torch.tensor([0, *(path[-1] for path in self.shape.paths)])
        self._depths_N = torch.tensor([0, *(len(path) for path in self.shape.paths)])
        self._sizes = torch.bincount(self._depths_N).tolist()

    @property
    def name(self) -> str:
        return f"recycling{self.shape.nodes}"

    def bind(self, target: Target) -> "TokenRecycling":
        super().bind(target)
        device = target.device
        self._parents_N = self._parents_N.to(device)
        self._ranks_N = self._ranks_N.to(device)
        self._depths_N = self._depths_N.to(device)
        return self

    def forget(self) -> None:
        """An empty matrix: -1 where no successor is known."""
        size = (self.target.vocab_size, self.successors)
        self._matrix_VK = torch.full(size, -1, dtype=torch.int32, device=self.target.device)

    def read(self, tree: Tree, logits_NV: Tensor) -> None:
        """Learn from every node."""
        self._update(tree.tokens_N, logits_NV)

    def start(self, features: Features, tokens_1T: Tensor) -> None:
        if not self.keep:
            self.forget()
        # Features end one before the tokens: behind the last token the target has said nothing yet.
        rows_Td = features.final_BTd[0]
        for start in range(0, len(rows_Td), ROWS):
            rows_Nd = rows_Td[start : start + ROWS]
            tokens_N = tokens_1T[0, start : start + len(rows_Nd)]
            self._update(tokens_N, self.target.project(rows_Nd))

    def extend(self, state: None, features: Features, tokens_1N: Tensor) -> None:
        """Nothing: `read` has seen these positions."""

    def propose(self, state: None, root: Tensor, policy: Policy | None = None) -> Tree:
        tokens = [root.reshape(1)]
        start = 1
        for size in self._sizes[1:]:
            level = slice(start, start + size)
            known_N = torch.cat(tokens)
            # A node without a token (-1) has none below it either: the row of any token will do.
            parent_N = known_N[self._parents_N[level]]
            token_N = self._matrix_VK[parent_N.clamp(min=0), self._ranks_N[level]].to(root.dtype)
            tokens.append(token_N.masked_fill(parent_N < 0, -1))
            start += size
        tokens_N = torch.cat(tokens)
        ones_N = torch.ones(len(tokens_N), device=root.device)
        tree = Tree(tokens_N, self._parents_N, self._depths_N, ones_N)
        there_N = tokens_N >= 0
        return tree if bool(there_N.all()) else tree.keep(there_N.nonzero()[:, 0])

    def _update(self, tokens_N: Tensor, logits_NV: Tensor) -> None:
        """Overwrite the rows of these tokens; the last of equal ones counts."""
        last = {token: row for row, token in enumerate(tokens_N.tolist())}
        rows_N = torch.tensor(list(last.values()), device=logits_NV.device)
        count = min(self.successors, logits_NV.shape[-1])
        best_NK = logits_NV.topk(count, dim=-1).indices[rows_N]
        self._matrix_VK[tokens_N[rows_N], :count] = best_NK.to(self._matrix_VK.dtype)
