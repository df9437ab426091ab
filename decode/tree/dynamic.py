"""Dynamic draft trees: the drafter's own confidence shapes each one (EAGLE-2, arXiv 2406.16858).

Shape legend: N frontier nodes, R ranks, M children, D draft vocabulary.
"""

import torch
from torch import Tensor

from decode.tree.ranked import best_first, check_ranks, keep_best, ranked
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.tree import Tree


class Dynamic(Policy):
    """Widely drafted, then cut to the nodes the drafter believes in most.

    A node's score is the log-probability of its path, sum of log q. At each depth

        every frontier node gives its `top_k` best tokens        (at most top_k^2 children)
        the top_k children with the highest scores are the next frontier

    and of all children of all depths the `nodes` - 1 with the highest scores are verified. `nodes`
    counts the root. A child never scores more than its parent and ties go to the node made earlier,
    so every parent of a kept node is kept.

    `depth` is the longest path, the number of drafter steps: "depth D" of the released code has
    D + 1 levels, one before its loop. A drafter that makes fewer drafts (`max_depth`) ends earlier.
    Steps are also spared where they cannot matter: a frontier node outside the `nodes` - 1 best so
    far is not extended, since neither it nor anything below it can come back.

    The tokens follow from q without chance, so q is one-hot to the verifier at every temperature.
    """

    def __init__(self, *, nodes: int = 60, depth: int = 6, top_k: int = 10) -> None:
        if nodes < 2:
            raise ValueError(
                f"tree.nodes={nodes} leaves no room for a draft, expected 2 or more, because the "
                "root (the token already known) is one of them; give a larger number."
            )
        if depth < 1 or top_k < 1:
            raise ValueError(
                f"tree.depth={depth} and tree.top_k={top_k} were given, expected 1 or more of "
                "each, because otherwise nothing is drafted; give larger numbers."
            )
        self.nodes = nodes
        self.depth = depth
        self.top_k = top_k
        self._scores: list[Tensor] = []  # log-probability of every child's path, in tree order
        self._frontier_N = torch.zeros(1)

    @property
    def name(self) -> str:
        """The shape in a word, for folders and tables."""
        return f"dynamic{self.nodes}-{self.depth}x{self.top_k}"

    def grow(
        self,
        depth: int,
        frontier: Frontier,
        logits_ND: Tensor,
        drafter: Drafter,
    ) -> Children | None:
        """The top_k children of each node, of which the best are extended."""
        if depth == 0:
            check_ranks("tree.top_k", self.top_k, logits_ND.shape[-1])
            self._scores = []
            self._frontier_N = logits_ND.new_zeros(1, dtype=torch.float32)
        log_q_NR, drafted_NR = ranked(logits_ND, self.top_k)
        score_M = (self._frontier_N[:, None] + log_q_NR).flatten()
        self._scores.append(score_M)
        expand_M = torch.zeros_like(score_M, dtype=torch.bool)
        if depth + 1 < self.depth:
            before = sum(len(scores) for scores in self._scores) - len(score_M)
            alive = best_first(torch.cat(self._scores), self.nodes - 1)
            # Places of this depth's children among them, still best first.
            alive = alive[alive >= before][: self.top_k] - before
            expand_M[alive] = True
            self._frontier_N = score_M[expand_M]
        rows = torch.arange(len(log_q_NR), device=score_M.device)
        return Children(
            drafter.to_target_ids(drafted_NR.flatten()),
            rows.repeat_interleave(self.top_k),
            torch.ones_like(score_M),
            expand_M,
        )

    def finish(self, tree: Tree) -> Tree:
        """The root and the `nodes` - 1 best of everything drafted."""
        return keep_best(tree, self._scores, self.nodes)
