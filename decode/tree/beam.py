"""Beam trees: the same number of nodes at every depth (LongSpec, arXiv 2502.17421).

Shape legend: N frontier nodes, R ranks, M children, D draft vocabulary.
"""

import torch
from torch import Tensor

from decode.tree.ranked import best_first, check_ranks, ranked
from models.drafter.base import Children, Drafter, Frontier, Policy


class Beam(Policy):
    """At every depth the `width` best continuations of all nodes above, all of them verified.

        children = top-`width` over (parent, token) of score(parent) + log q(token | parent)

    A tree has 1 + width * depth nodes and every depth is as wide, however sure the drafter is: what
    beam search keeps, with the levels it passed through. A depth has fewer where all that is above
    it has fewer continuations (one node has at most as many as the draft vocabulary has tokens).

    `depth` is the longest path, the number of drafter steps; a drafter that makes fewer drafts
    (`max_depth`) ends earlier. Deviation from the paper's level sizes [4, 16, 16, 16, 16]: the
    first depth is as wide as the others. The tokens follow from q without chance, so q is one-hot
    to the verifier at every temperature.
    """

    def __init__(self, *, width: int = 8, depth: int = 5) -> None:
        if width < 1 or depth < 1:
            raise ValueError(
                f"tree.width={width} and tree.depth={depth} were given, expected 1 or more of "
                "each, because otherwise nothing is drafted; give larger numbers."
            )
        self.width = width
        self.depth = depth
        self._frontier_N = torch.zeros(1)

    @property
    def name(self) -> str:
        """The shape in a word, for folders and tables."""
        return f"beam{self.width}x{self.depth}"

    def grow(
        self,
        depth: int,
        frontier: Frontier,
        logits_ND: Tensor,
        drafter: Drafter,
    ) -> Children | None:
        """The best `width` continuations of the frontier, parents in order."""
        if depth == 0:
            check_ranks("tree.width", self.width, logits_ND.shape[-1])
            self._frontier_N = logits_ND.new_zeros(1, dtype=torch.float32)
        # No node can have more than `width` of the best `width`, so that many ranks are enough.
        log_q_NR, drafted_NR = ranked(logits_ND, self.width)
        score_NR = self._frontier_N[:, None] + log_q_NR
        best_M = best_first(score_NR.flatten(), self.width).sort().values
        self._frontier_N = score_NR.flatten()[best_M]
        last = depth + 1 >= self.depth
        return Children(
            drafter.to_target_ids(drafted_NR.flatten()[best_M]),
            best_M // self.width,
            torch.ones_like(self._frontier_N),
            torch.full_like(best_M, not last, dtype=torch.bool),
        )
