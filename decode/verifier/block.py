"""Block verification (Sun et al., 2024, arXiv 2403.10444).

Shape legend: V vocabulary.
"""

from decode.chance import Chance
from decode.verifier.base import TargetLaw, Verdict, draft_row, excess
from models.drafter.base import Tree


class Block:
    """Accept a prefix of a chain as a whole; never fewer tokens in the mean than token by token.

    With x_1..x_gamma the drafts, and p, q after x_1..x_i:

        w_0 = 1,   w_i = min(1, w_{i-1} p(x_i) / q(x_i))
        S_i = sum_v (w_i p(v) - q(v))+
        h_i = S_i / (S_i + 1 - w_i) for i < gamma,   h_gamma = w_gamma

    Each i is accepted with h_i, independently of the others, and the longest accepted prefix is
    kept (none: i = 0). The next token comes from p after the whole chain, else from
    norm((w_i p - q)+). w_i is the chance that x_1..x_i *may* be kept, h_i makes up for the longer
    prefixes tried before: accepting with w_i instead is biased.

    Drafts need not be random: where a tree has no q it is one-hot at the draft.
    """

    lossy = False
    greedy_only = False

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """From the deepest prefix up; the empty one is always accepted."""
        self._check(tree)
        tokens, gamma = tree.tokens_N.tolist(), len(tree) - 1
        laws, weights = [p(0)], [1.0]
        for i in range(1, gamma + 1):
            q = 1.0 if tree.q_NV is None else float(tree.q_NV[i, tokens[i]])
            # The law of x_i is the one after x_{i-1}.
            weight = min(1.0, weights[-1] * float(laws[-1][tokens[i]]) / q)
            if weight == 0.0:
                break  # w and h are 0 from here on
            weights.append(weight)
            laws.append(p(i))
        path = list(range(gamma + 1))
        if len(laws) == len(path) and chance.coin(weights[gamma]):
            return Verdict(path, chance.draw(laws[gamma]))
        for i in range(min(len(laws), gamma) - 1, 0, -1):
            left_V, h = excess(laws[i], draft_row(tree, i + 1, laws[i]), weights[i])
            if chance.coin(h):
                return Verdict(path[: i + 1], chance.draw(left_V))
        left_V, _ = excess(laws[0], draft_row(tree, 1, laws[0]), 1.0)
        return Verdict(path[:1], chance.draw(left_V))

    @staticmethod
    def _check(tree: Tree) -> None:
        if tree.parents_N.tolist() != list(range(-1, len(tree) - 1)):
            raise ValueError(
                f"verifier=block was given a tree of {len(tree)} nodes with siblings, but it "
                "accepts prefixes of one chain, because a prefix has one probability only there; "
                "use tree=chain, or verifier=traversal, which is the same rule for trees."
            )
