"""Trees of sampled siblings, which a sampling target verifies without loss.

Shape legend: N frontier nodes, S siblings, M = N * S children, D draft vocabulary, V target
vocabulary.
"""

import torch
from torch import Tensor

from decode.chance import SeededChance
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.sampling import probabilities


class Sampled(Policy):
    """`widths[k]` children for every node at depth k, drawn from q at the serving temperature.

    Without replacement (RSD, arXiv 2402.14160; Sequoia, arXiv 2402.12374) siblings are drawn one
    after another, each from what is left of q:

        x_1 ~ q_1 = q,    x_{i+1} ~ q_{i+1} = norm(q_i with q_i(x_i) = 0)

    which is the law of the Gumbel-top-k trick, in the order of the draws. A node gets fewer
    children where the nucleus holds fewer tokens. With replacement (SpecInfer, arXiv 2305.09781;
    SpecTr, arXiv 2310.15141) they are independent draws from q. A token drawn again then stays a
    node of its own, because verification counts draws; but it is a leaf, and a rule that accepts it
    goes on at the first of its kind, so nothing is drafted twice.

    Each node keeps the whole distribution it was drawn from (V numbers). At temperature 0 the tree
    is the limit of these draws, which is not random: the S best tokens in order without
    replacement, the best one alone with it.
    """

    def __init__(
        self,
        *,
        widths: list[int],
        replacement: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(
                f"tree.widths={list(widths)} should list one number of children, 1 or more, for "
                "each depth, because every node of a depth gets as many; give [4] for four drafts "
                "of the next token, [3, 2, 1, 1] for four depths."
            )
        self.widths = list(widths)
        self.replacement = replacement
        self.temperature = temperature
        self.top_p = top_p
        # A stream apart from the verifier's: the same seed there must not mean the same uniforms.
        self._chance = SeededChance(seed=seed ^ 0x5EED)

    @property
    def name(self) -> str:
        """The shape in a word, for folders and tables."""
        widths = "-".join(str(width) for width in self.widths)
        return f"{'iid' if self.replacement else 'sampled'}{widths}"

    def grow(
        self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: Drafter
    ) -> Children | None:
        """The siblings below every frontier node; None after the last width."""
        if depth >= len(self.widths):
            return None
        if depth == 0:
            self._check(drafter)
        width, last = self.widths[depth], depth + 1 == len(self.widths)
        if self.temperature == 0.0:
            return self._best(logits_ND, 1 if self.replacement else width, drafter, last)
        q_ND = probabilities(logits_ND, temperature=self.temperature, top_p=self.top_p)
        draw = draw_independent if self.replacement else draw_one_by_one
        drawn_NS, drawn_from, exists_NS, first_NS = draw(q_ND, width, self._chance)
        q_MV = torch.stack([drafter.full_distribution(q) for q in drawn_from], dim=1).flatten(0, 1)
        if not bool(exists_NS.all()):
            q_MV = q_MV[exists_NS.flatten()]
        # Siblings side by side, in the order drawn.
        nodes_NS = torch.arange(len(q_ND), device=q_ND.device)[:, None].expand_as(drawn_NS)
        tokens_M = drafter.to_target_ids(drawn_NS[exists_NS])
        expand_NS = torch.zeros_like(first_NS) if last else first_NS
        return Children(
            tokens_M,
            nodes_NS[exists_NS],
            q_MV.gather(1, tokens_M[:, None])[:, 0],
            expand_NS[exists_NS],
            q_MV,
            self.replacement,
        )

    def _best(self, logits_ND: Tensor, width: int, drafter: Drafter, last: bool) -> Children:
        """The best tokens in order, a deterministic choice: no q."""
        best_NS = logits_ND.topk(min(width, logits_ND.shape[-1]), dim=-1).indices
        nodes_N = torch.arange(len(best_NS), device=best_NS.device)
        best_M = best_NS.flatten()
        expand_M = torch.full_like(best_M, not last, dtype=torch.bool)
        ones_M = torch.ones(len(best_M), device=best_M.device)
        nodes_M = nodes_N.repeat_interleave(best_NS.shape[1])
        return Children(drafter.to_target_ids(best_M), nodes_M, ones_M, expand_M)

    def _check(self, drafter: Drafter) -> None:
        limit = drafter.max_depth
        if limit is not None and len(self.widths) > limit:
            raise ValueError(
                f"tree.widths={self.widths} has {len(self.widths)} depths, but this drafter makes "
                f"at most {limit}, because it was trained with that many; give {limit} widths or "
                "fewer."
            )


Drawn = tuple[Tensor, list[Tensor], Tensor, Tensor]
"""Drafts `[N, S]`, the law `[N, D]` of each of the S draws, which drafts exist and which are the
first of their kind at their node (both `[N, S]`)."""


def draw_independent(q_ND: Tensor, width: int, chance: SeededChance) -> Drawn:
    """S draws from each row, with replacement."""
    drawn_NS = chance.draws(q_ND, width)
    again_NS = (drawn_NS[:, :, None] == drawn_NS[:, None, :]).tril(-1).any(-1)
    return drawn_NS, [q_ND] * width, torch.ones_like(again_NS), ~again_NS


def draw_one_by_one(q_ND: Tensor, width: int, chance: SeededChance) -> Drawn:
    """S draws from each row without replacement, or fewer: as many as q has ids."""
    drawn: list[Tensor] = []
    drawn_from, exists = [], []
    for i in range(width):
        if i > 0:
            left_ND = q_ND.scatter(1, drawn[-1], 0.0)
            total_N1 = left_ND.sum(-1, keepdim=True)
            # Nothing is left once the whole nucleus is drawn: q stays 0, and there are no more.
            q_ND = left_ND / total_N1.where(total_N1 > 0.0, 1.0)
        drawn.append(chance.draws(q_ND, 1))
        drawn_from.append(q_ND)
        exists.append(q_ND.any(-1, keepdim=True))
    exists_NS = torch.cat(exists, dim=1)
    return torch.cat(drawn, dim=1), drawn_from, exists_NS, exists_NS
