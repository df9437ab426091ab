"""How often one of the root's sampled siblings is accepted, beside the best any rule could do.

Shape legend: R repetitions, S siblings, N tree nodes, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decode.chance import Chance, SeededChance
from decode.interval import Estimate, bootstrap
from decode.optimal import acceptance_bound, optimal_acceptance
from decode.tree.sampled import draw_independent, draw_one_by_one
from decode.verifier.base import TargetLaw, Verdict, Verifier
from models.drafter.base import Tree

EVERY, MOST = 4, 4
"""Of each prompt's rounds every 4th is looked at, at most 4: the first, fifth, ..."""
AGAIN = 16
"""Sets of siblings drawn for each of these rounds."""


@dataclass(frozen=True)
class Siblings:
    """The root's siblings over some rounds: mean chance that one of them is accepted by the rule,
    and the mean optimum for the same p and q (decode/optimal; exact for independent siblings,
    otherwise an upper bound).

    The chance is exact over the rule's coins and the mean over siblings drawn again from the same
    q, as many as there were. It looks at them alone: what is drafted below does not count.
    """

    rounds: int
    replacement: bool
    rule: Estimate
    optimum: Estimate


class SiblingWatch:
    """A verifier that does what another does, and keeps what some rounds looked like.

    `take` computes the figures of the rounds since the last call: outside of any timed part.
    """

    def __init__(self, rule: Verifier) -> None:
        self.rule = rule
        self.lossy = rule.lossy
        self.greedy_only = rule.greedy_only
        self._chance = SeededChance(seed=0)
        self._round = 0
        self._kept: list[tuple[Tree, Tensor]] = []
        self._found: list[list[tuple[float, float, bool]]] = []

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """The other rule's verdict."""
        if self._round % EVERY == 0 and self._round < EVERY * MOST and tree.q_NV is not None:
            siblings = (tree.depths_N <= 1).nonzero()[:, 0]
            if len(siblings) > 2:
                self._kept.append((tree.keep(siblings), p(0).clone()))
        self._round += 1
        return self.rule.verify(tree, p, chance)

    def take(self, *, discard: bool = False) -> None:
        """A prompt is done (or was a warm-up: `discard`)."""
        kept, self._kept, self._round = self._kept, [], 0
        if kept and not discard:
            self._found.append([self._figures(tree, p_V) for tree, p_V in kept])

    def result(self) -> Siblings | None:
        """Over all prompts; None when no round had sampled siblings."""
        if not self._found:
            return None
        return Siblings(
            rounds=sum(len(one) for one in self._found),
            replacement=all(independent for one in self._found for _, _, independent in one),
            rule=bootstrap(self._found, lambda one: (sum(a for a, _, _ in one), len(one))),
            optimum=bootstrap(self._found, lambda one: (sum(b for _, b, _ in one), len(one))),
        )

    def _figures(self, tree: Tree, p_V: Tensor) -> tuple[float, float, bool]:
        assert tree.q_NV is not None
        q_V, count = tree.q_NV[1], len(tree) - 1
        best = optimal_acceptance if tree.replacement else acceptance_bound
        draw = draw_independent if tree.replacement else draw_one_by_one
        drawn_RS, drawn_from, exists_RS, _ = draw(q_V.expand(AGAIN, -1), count, self._chance)
        assert bool(exists_RS.all())
        found = 0.0
        for row, tokens_S in enumerate(drawn_RS):
            q_SV = torch.stack([q_RV[row] for q_RV in drawn_from])
            redrawn = replace(
                tree,
                tokens_N=torch.cat([tree.tokens_N[:1], tokens_S]),
                q_NV=torch.cat([tree.q_NV[:1], q_SV]),
            )
            found += acceptance(self.rule, redrawn, p_V)
        return found / AGAIN, best(p_V, q_V, count), tree.replacement


def acceptance(rule: Verifier, tree: Tree, p_V: Tensor) -> float:
    """The chance that a rule accepts one of the children of a tree of one level.

    Every rule tosses a coin a child until one shows heads; so the chance is that not all are tails.
    """
    assert int(tree.depths_N.max()) <= 1
    tails = _Tails()
    verdict = rule.verify(tree, lambda _: p_V, tails)
    return 1.0 if len(verdict.path) > 1 else 1.0 - tails.probability


class _Tails:
    """A `Chance` whose coins all show tails, unless heads is certain."""

    def __init__(self) -> None:
        self.probability = 1.0

    def coin(self, probability: float) -> bool:
        if probability >= 1.0:
            return True
        self.probability *= 1.0 - probability
        return False

    def draw(self, p_V: Tensor) -> int:
        return 0
