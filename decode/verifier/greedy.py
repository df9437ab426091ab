"""Greedy verification."""

from decode.chance import Chance
from decode.verifier.base import TargetLaw, Verdict, children_of
from models.drafter.base import Tree


class Greedy:
    """Keep the longest path whose every token is the target's argmax.

    Rule: at each accepted node take the target's best token; if a child carries it, move there,
    otherwise that token is the bonus. Siblings carry different tokens, so there is one such path.
    """

    lossy = False
    greedy_only = True

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """Deterministic; `chance` is not asked."""
        children, tokens = children_of(tree), tree.tokens_N.tolist()
        path = [0]
        while True:
            best = int(p(path[-1]).argmax())
            match = [child for child in children[path[-1]] if tokens[child] == best]
            if not match:
                return Verdict(path, best)
            path.append(match[0])
