"""The best static tree for measured acceptance and measured time (Sequoia, arXiv 2402.12374).

Shape legend: K depths, R ranks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from conf.console import say
from decode.tree.cost import Cost, cached_cost
from decode.tree.static import StaticTree, TreeShape, best_tree, needed
from models.drafter.base import Drafter
from models.target import Target


class Sequoia(StaticTree):
    """The static tree with the most expected tokens a second, of at most `nodes` nodes.

        maximise over sizes m and depths l:   tau(m, l) / (draft(l) + target(m))

    tau(m, l) are the expected tokens of the best tree with m nodes and no path longer than l, by
    the run's acceptance of each rank at each depth. The paper finds that tree by a dynamic
    programme over (nodes, depth, children of the root), with one acceptance vector for all depths.
    Here vectors differ by depth, and no programme is needed: tau is 1 plus a sum over nodes of what
    a node's path is worth, a child is never worth more than its parent, so the most valuable nodes
    of depth <= l are the best tree (`best_tree` of the first l depths). It is compared with the
    programme in the tests.

    The time is `cost`: measured with this target and drafter on this machine, once, and kept in the
    run's decode/cost.json; or given in the configuration. Deviation from the paper, where a draft
    step costs the same on any number of nodes: here it depends on how many are extended, so of
    trees with the same m and l only the one with the highest tau is considered.

    The tree is chosen among trees alone: where a drafter does not pay, decoding without it is
    faster than the best of them.
    """

    def __init__(
        self,
        *,
        nodes: int = 64,
        cost: Cost | None = None,
        accuracy_KR: Sequence[Sequence[float]] | None,
        target: Target,
        drafter: Drafter,
        run_dir: Path | None = None,
    ) -> None:
        accuracy_KR = needed(accuracy_KR, "sequoia")[: drafter.max_depth]
        if cost is None:
            cost = cached_cost(
                target=target,
                drafter=drafter,
                nodes=nodes,
                depth=len(accuracy_KR),
                folder=None if run_dir is None else run_dir / "decode",
            )
        self._plan(fastest_tree(accuracy_KR, cost, nodes))
        self.expected_tau = self.shape.expected_tau(accuracy_KR)
        self.expected_ms = cost.of(self.shape)
        say(
            f"Sequoia's tree: {self.shape.nodes} nodes, {self.shape.depth} deep; expected are "
            f"{self.expected_tau:.2f} tokens in {self.expected_ms:.1f} ms."
        )

    @property
    def name(self) -> str:
        """The shape in a word, for folders and tables."""
        return f"sequoia{self.shape.nodes}-{self.shape.depth}"


def fastest_tree(accuracy_KR: Sequence[Sequence[float]], cost: Cost, nodes: int) -> TreeShape:
    """The tree with the most expected tokens per millisecond; the smaller one among equals."""
    largest = best_tree(accuracy_KR, nodes)
    return max(
        candidates(accuracy_KR, largest.nodes),
        key=lambda shape: shape.expected_tau(accuracy_KR) / cost.of(shape),
        default=largest,  # the root alone, where no draft was ever right
    )


def candidates(accuracy_KR: Sequence[Sequence[float]], nodes: int) -> Iterator[TreeShape]:
    """The best tree of every depth limit and size, smaller and shallower ones first."""
    for size in range(2, nodes + 1):
        for depth in range(1, len(accuracy_KR) + 1):
            shape = best_tree(accuracy_KR[:depth], size)
            if shape.nodes == size and shape.depth == depth:
                yield shape
