"""Static draft trees, built from measured accuracies (Medusa, arXiv 2401.10774, section 2.3.3).

Shape legend: K depths, R ranks, N frontier nodes, M children, D draft vocabulary.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from models.drafter.base import Children, Drafter, Frontier, Policy


@dataclass(frozen=True)
class TreeShape:
    """Which ranks are drafted where, independent of the tokens.

    A node is its path of ranks from the root: (0, 2) is the third best child of the best child.
    `paths` are sorted by length, then by ranks; the root () is not listed but counts in `nodes`,
    which is the number of tokens in the target's verification forward.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        known = {(), *self.paths}
        assert len(known) == len(self.paths) + 1, "a path is listed twice"
        assert all(path[:-1] in known for path in self.paths), "a node without its parent"
        ordered = sorted(self.paths, key=lambda path: (len(path), path))
        object.__setattr__(self, "paths", tuple(ordered))

    @property
    def nodes(self) -> int:
        """Tokens verified at once, root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def levels(self) -> tuple["Level", ...]:
        """The shape depth by depth, as a draft is grown."""
        with_children = {path[:-1] for path in self.paths}
        frontier: list[tuple[int, ...]] = [()]
        levels = []
        for depth in range(1, self.depth + 1):
            here = [path for path in self.paths if len(path) == depth]
            place = {path: i for i, path in enumerate(frontier)}
            levels.append(
                Level(
                    parents_M=torch.tensor([place[path[:-1]] for path in here]),
                    ranks_M=torch.tensor([path[-1] for path in here]),
                    expand_M=torch.tensor([path in with_children for path in here]),
                    width=1 + max(path[-1] for path in here),
                )
            )
            frontier = [path for path in here if path in with_children]
        return tuple(levels)

    def expected_tau(self, accuracy_KR: Sequence[Sequence[float]]) -> float:
        """Tokens per target forward (bonus included) if acceptances were independent:
        1 + the sum over nodes of the product of accuracies on the node's path."""
        return 1.0 + sum(
            prod(accuracy_KR[k][rank] for k, rank in enumerate(path)) for path in self.paths
        )


@dataclass(frozen=True)
class Level:
    """The children at one depth: index of each one's parent in the frontier, its rank among the
    drafter's choices there, and whether it is extended. `width` ranks are needed at most."""

    parents_M: Tensor
    ranks_M: Tensor
    expand_M: Tensor
    width: int

    def to(self, device: torch.device) -> "Level":
        """This level's index tensors on a device."""
        return Level(
            self.parents_M.to(device),
            self.ranks_M.to(device),
            self.expand_M.to(device),
            self.width,
        )


def best_tree(accuracy_KR: Sequence[Sequence[float]], nodes: int) -> TreeShape:
    """The tree of `nodes` nodes (root included) with the largest expected tau.

    `accuracy_KR[k][r]` is the chance that the drafter's rank-r token at depth k is the right one.
    A node is reached with the product of accuracies along its path, and the expected number of
    accepted drafts is the sum of those products. A child never has more than its parent, so taking
    the largest product on the frontier again and again takes the `nodes` - 1 largest of all, which
    is optimal. Paths that were never right are left out, even if the tree stays smaller.
    """
    if nodes < 2:
        raise ValueError(
            f"tree.nodes={nodes} leaves no room for a draft, expected 2 or more, because the root "
            "(the token already known) is one of them; give a larger number."
        )
    paths: list[tuple[int, ...]] = []
    # Heap entries: minus the product, then the path, so that ties go to the shallower, better rank.
    frontier: list[tuple[float, int, tuple[int, ...]]] = [
        (-a, 1, (rank,)) for rank, a in enumerate(accuracy_KR[0])
    ]
    heapq.heapify(frontier)
    while frontier and len(paths) + 1 < nodes:
        product, length, path = heapq.heappop(frontier)
        if product == 0.0:
            break
        paths.append(path)
        if length < len(accuracy_KR):
            for rank, a in enumerate(accuracy_KR[length]):
                heapq.heappush(frontier, (product * a, length + 1, (*path, rank)))
    return TreeShape(tuple(paths))


def needed(accuracy_KR: Sequence[Sequence[float]] | None, tree: str) -> Sequence[Sequence[float]]:
    """The accuracies a tree is built from; an error that says what to do when there are none."""
    if accuracy_KR is None:
        raise ValueError(
            f"tree={tree} needs the run's rank_accuracy.json and this run has none, because the "
            "best shape follows from how often each rank is right at each depth; finish the "
            "training run (it measures them on the validation split), or use tree=chain."
        )
    return accuracy_KR


class StaticTree(Policy):
    """Drafts of one fixed shape: each node gets the drafter's best tokens by rank.

    Deterministic, so it is verified with q one-hot at every temperature. The shape comes from the
    run's own rank accuracies through `best_tree`.
    """

    def __init__(self, *, nodes: int, accuracy_KR: Sequence[Sequence[float]] | None) -> None:
        self._plan(best_tree(needed(accuracy_KR, "static"), nodes))

    def _plan(self, shape: TreeShape) -> None:
        self.shape = shape
        self._levels = list(shape.levels)
        self._ones = [torch.ones(len(level.ranks_M)) for level in self._levels]

    @property
    def name(self) -> str:
        """The shape in a word, for folders and tables."""
        return f"tree{self.shape.nodes}"

    def grow(
        self,
        depth: int,
        frontier: Frontier,
        logits_ND: Tensor,
        drafter: Drafter,
    ) -> Children | None:
        """The children of one level: token of rank r of each one's parent."""
        if depth >= len(self._levels):
            return None
        level, ones_M = self._levels[depth], self._ones[depth]
        if level.ranks_M.device != logits_ND.device:
            level = self._levels[depth] = level.to(logits_ND.device)
            ones_M = self._ones[depth] = ones_M.to(logits_ND.device)
        self._check(depth, level.width, logits_ND.shape[-1], drafter)
        top_NR = logits_ND.topk(level.width, dim=-1).indices
        drafted_M = top_NR[level.parents_M, level.ranks_M]
        tokens_M = drafter.to_target_ids(drafted_M)
        return Children(tokens_M, level.parents_M, ones_M, level.expand_M)

    def _check(self, depth: int, width: int, vocabulary: int, drafter: Drafter) -> None:
        limit = drafter.max_depth
        if depth == 0 and limit is not None and self.shape.depth > limit:
            raise ValueError(
                f"The tree has {self.shape.depth} depths but this drafter makes at most {limit}, "
                "so the rank accuracies it was built from belong to another drafter; use the "
                "rank_accuracy.json of the drafter's own run."
            )
        if width > vocabulary:
            raise ValueError(
                f"The tree takes the {width} best drafts of a node but the draft vocabulary has "
                f"only {vocabulary} tokens; measure the rank accuracies over fewer ranks."
            )
