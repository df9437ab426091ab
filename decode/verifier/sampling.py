"""Exact sampling verification (Leviathan et al., 2023, arXiv 2211.17192), siblings by recursive
rejection (SpecInfer, arXiv 2305.09781; without replacement RSD, arXiv 2402.14160).

Shape legend: V vocabulary.
"""

from torch import Tensor

from decode.chance import Chance
from decode.verifier.base import TargetLaw, Verdict, check_draws, children_of
from models.drafter.base import Tree


class Sampling:
    """Accept or reject so that every token has exactly the target's distribution.

    Rule at an accepted node: start with r = p. For each child x, in the order of the draws,

        accept x with probability min(1, r(x) / q(x)); else r <- norm((r - q)+), next child

    and if no child was accepted draw the bonus token from r. Here q is the law this child was drawn
    from *given the siblings before it*, which is its row of the tree. Special cases:
    - a chain has one child a node: min(1, p/q), residual norm((p - q)+), bonus from p at the end;
    - a deterministic tree has q one-hot at x: accept with r(x), else r(x) <- 0 and renormalise;
    - independent siblings (`tree.replacement`) share one q. A token that was rejected has r(x) = 0
      from then on, so its second draw is never accepted, but its rejection changes r all the same;
    - siblings without replacement have q(x) <- 0 and q renormalised after every draw.
    At temperature 0 p is one-hot and the rule is the greedy one.
    """

    lossy = False
    greedy_only = False

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """Walk down from the root; the walk ends at the first node with no accepted child."""
        check_draws(tree)
        children, tokens = children_of(tree), tree.tokens_N.tolist()
        path = [0]
        while True:
            r_V = p(path[-1])
            for child in children[path[-1]]:
                token = tokens[child]
                if tree.q_NV is None:
                    accept = float(r_V[token])
                else:
                    accept = float(r_V[token]) / float(tree.q_NV[child, token])
                if chance.coin(accept):
                    path.append(child)
                    break
                r_V = _residual(r_V, token, None if tree.q_NV is None else tree.q_NV[child])
            else:
                return Verdict(path, chance.draw(r_V))


def _residual(r_V: Tensor, token: int, q_V: Tensor | None) -> Tensor:
    """norm((r - q)+); q = None means one-hot at the rejected token."""
    if q_V is None:
        left_V = r_V.clone()
        left_V[token] = 0.0
    else:
        left_V = (r_V - q_V).clamp_(min=0.0)
    total = float(left_V.sum())
    # No mass is left only when r = q, where rejection has probability 0 up to rounding.
    return left_V / total if total > 0.0 else r_V
