"""Greedy expansion of the most promising draft (DySpec, arXiv 2410.11744).

Shape legend: N frontier nodes, R siblings, M children, D draft vocabulary, V target vocabulary.
"""

import math

import torch
from torch import Tensor

from decode.tree.ranked import best_first, keep_best, ranked
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.sampling import probabilities
from models.tree import Tree


class DySpec(Policy):
    """The `nodes` - 1 drafts most likely to be accepted, if q were the chance of acceptance.

    A *slot* is the place of the i-th child of a node. Its value is the chance that verification
    comes that far, and a node's value is that of the slot of its first child:

        v(root) = 1
        v(slot i below a) = v(a) * (1 - q(x_1) - ... - q(x_{i-1}))    x_j: the siblings before
        v(node x in that slot) = v(a) * q(x)

    (With siblings drawn without replacement, x_i from q_i = q without x_1..x_{i-1}, normalised, the
    second line is the product of 1 - q_j(x_j) and the third one v(slot) * q_i(x).) The paper pops
    the slot of the highest value from a heap, drafts there, and pushes the slot of the next sibling
    and the slot of the new node's first child, `nodes` - 1 times.

    At temperature 0 drafts are a node's best tokens in order. They are known before they are
    chosen, so what counts is v(node): the tree holds the `nodes` - 1 nodes of the highest product
    of q (at temperature 1), which is the best there is if q is right; the verifier sees q one-hot.
    Otherwise siblings are drawn without replacement at the serving temperature, and what counts is
    v(slot), which does not depend on the token drawn there: choosing among tokens already drawn
    would change the output's law. `temperature: 0` in the tree's own configuration drafts the best
    tokens under a sampling target, which is exact as well.

    Depth by depth instead of slot by slot. What the heap pushes is never worth more than what was
    popped before it (a next sibling has less left, a child its parent's value times q <= 1). So the
    heap pops values in falling order, and its tree is that of the `nodes` - 1 most valuable slots
    of all. A slot that is not among the `nodes` - 1 best of *some* slots is not among the best of
    all, and then neither is anything below or after it. Hence: at each depth take all slots below
    the frontier, keep those among the best so far, extend the nodes that are worth more than the
    last of them; at the end keep the best. That takes one drafter step a depth, not one a node.
    Ties go to the slot made earlier.

    `depth` limits the longest path (the number of steps); a drafter that makes fewer drafts
    (`max_depth`) ends earlier. `threshold` leaves out what is worth no more than it, so that an
    unsure drafter makes smaller trees.
    """

    def __init__(
        self,
        *,
        nodes: int = 60,
        depth: int = 8,
        threshold: float = 0.0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        if nodes < 2 or depth < 1:
            raise ValueError(
                f"tree.nodes={nodes} and tree.depth={depth} leave no room for a draft, expected 2 "
                "or more nodes (the root, already known, is one) and 1 or more depths; give larger "
                "numbers."
            )
        if not 0.0 <= threshold < 1.0:
            raise ValueError(
                f"tree.threshold={threshold} should lie in [0, 1), because it is compared with the "
                "probability that verification reaches a draft; 0 drafts all `nodes`."
            )
        self.nodes = nodes
        self.depth = depth
        self.threshold = threshold
        self.temperature = temperature
        self.top_p = top_p
        # A stream apart from the verifier's: the same seed there must not mean the same numbers.
        self._generator = torch.Generator().manual_seed(seed ^ 0x5EED)
        self._slots: list[Tensor] = []  # log v of the slot of every node drafted, in tree order
        self._values_N = torch.zeros(1)  # log v of every frontier node

    @property
    def name(self) -> str:
        """The shape in a word, for folders and tables."""
        least = f"-over{self.threshold:g}" if self.threshold > 0.0 else ""
        drawn = "sampled" if self.temperature > 0.0 else ""
        return f"dyspec{drawn}{self.nodes}-{self.depth}{least}"

    def grow(
        self,
        depth: int,
        frontier: Frontier,
        logits_ND: Tensor,
        drafter: Drafter,
    ) -> Children | None:
        """The children that are among the best so far; those that may have such are extended."""
        if depth == 0:
            self._slots = []
            self._values_N = torch.zeros(1, device=logits_ND.device)
        siblings = min(self.nodes - 1, logits_ND.shape[-1])
        above_N1 = self._values_N[:, None]
        q_ND = None
        if self.temperature == 0.0:
            log_q_NR, drafts_NR = ranked(logits_ND, siblings)
            slots_NR = values_NR = above_N1 + log_q_NR
        else:
            q_ND = probabilities(logits_ND, temperature=self.temperature, top_p=self.top_p)
            drafts_NR = self._draw(q_ND, siblings)
            q_NR = q_ND.gather(1, drafts_NR)
            # What the siblings before have left; rounding must not let it rise.
            left_NR = (1.0 - (q_NR.cumsum(-1) - q_NR)).clamp(min=0.0).cummin(-1).values
            slots_NR = (above_N1 + left_NR.log()).where(q_NR > 0.0, float("-inf"))
            values_NR = torch.minimum(slots_NR, above_N1 + q_NR.log())
        new_M, bar = self._choose(slots_NR.flatten())
        if len(new_M) == 0:
            return None
        rows_M, places_M = new_M // siblings, new_M % siblings
        values_M = values_NR.flatten()[new_M]
        expand_M = (values_M > bar) & (depth + 1 < self.depth)
        self._values_N = values_M[expand_M]
        tokens_M = drafter.to_target_ids(drafts_NR.flatten()[new_M])
        if q_ND is None:
            return Children(tokens_M, rows_M, torch.ones_like(values_M), expand_M)
        q_MD = without_earlier(q_ND[rows_M], drafts_NR[rows_M], places_M)
        draws_M = q_MD.gather(1, drafts_NR.flatten()[new_M, None])[:, 0]
        q_MV = drafter.full_distribution(q_MD)
        return Children(tokens_M, rows_M, draws_M, expand_M, q_MV, replacement=False)

    def finish(self, tree: Tree) -> Tree:
        """The root and the best of everything drafted."""
        return keep_best(tree, self._slots, self.nodes)

    def _choose(self, slots_M: Tensor) -> tuple[Tensor, float | Tensor]:
        """Which of this depth's slots are among the best so far, in tree order, and the value that
        anything still to come must exceed."""
        floor = math.log(self.threshold) if self.threshold > 0.0 else float("-inf")
        before = sum(len(slots) for slots in self._slots)
        known = torch.cat([*self._slots, slots_M])
        best = best_first(known, self.nodes - 1)
        best = best[known[best] > floor]
        full = len(best) == self.nodes - 1
        new_M = best[best >= before].sort().values - before
        self._slots.append(slots_M[new_M])
        return new_M, known[best[-1]] if full else floor

    def _draw(self, q_ND: Tensor, count: int) -> Tensor:
        """`count` draws from each row without replacement, in order: an exponential race. Noise is
        made on the CPU, the same for every device."""
        noise_ND = torch.empty(q_ND.shape).exponential_(generator=self._generator)
        return (q_ND / noise_ND.to(q_ND.device)).topk(count, dim=-1).indices


def without_earlier(q_MD: Tensor, drafts_MR: Tensor, places_M: Tensor) -> Tensor:
    """What the draft at place i was drawn from: q without its row's drafts 0..i-1, normalised."""
    places_R = torch.arange(drafts_MR.shape[1], device=q_MD.device)
    q_MR = q_MD.gather(1, drafts_MR)
    left_MD = q_MD.scatter(1, drafts_MR, q_MR.where(places_R >= places_M[:, None], 0.0))
    return left_MD / left_MD.sum(-1, keepdim=True)
