"""Traversal verification (Weng et al., 2025, arXiv 2505.12398).

Shape legend: V vocabulary.
"""

from torch import Tensor

from decode.chance import Chance
from decode.verifier.base import (
    TargetLaw,
    Verdict,
    check_draws,
    children_of,
    draft_row,
    excess,
)
from models.drafter.base import Tree


class Traversal:
    """Accept whole paths of a tree, leaves first: block verification with siblings.

    Every node has a weight a, the root 1; a child x drawn from q below a node with weight a and
    law p gets min(1, a p(x) / q(x)). Leaves are visited in the order of the draws, children before
    their parent. A node is accepted, its whole path with it, with its weight, and the next token
    then comes from its law. If it is not it is deleted, and at its parent

        S = sum_v (a p(v) - q(v))+,   p <- norm((a p - q)+),   a <- S / (S + 1 - a)

    before the next sibling's weight is made from the new a and p, with q the law this sibling was
    drawn from (its row of the tree: independent of the others, or from what was left). A node whose
    children are all deleted is tried itself. The root is then accepted with weight 1.

    On a chain this is block verification, a its h. Without q a child's is one-hot.
    """

    lossy = False
    greedy_only = False

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """Visit every leaf that must be visited; ends at the first accepted node."""
        check_draws(tree)
        children, tokens = children_of(tree), tree.tokens_N.tolist()

        def visit(node: int, a: float) -> tuple[list[int], Tensor] | None:
            """The accepted path from here down (deepest last) and the law after it, if any."""
            if a == 0.0:
                return None  # nor can anything below be accepted
            p_V = p(node)
            for child in children[node]:
                q_V, token = draft_row(tree, child, p_V), tokens[child]
                found = visit(child, min(1.0, a * float(p_V[token]) / float(q_V[token])))
                if found is not None:
                    return [node, *found[0]], found[1]
                p_V, a = excess(p_V, q_V, a)
            return ([node], p_V) if chance.coin(a) else None

        found = visit(0, 1.0)
        assert found is not None, "the root has weight 1"
        path, law_V = found
        return Verdict(path, chance.draw(law_V))
