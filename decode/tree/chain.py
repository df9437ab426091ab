"""A chain: one draft at each depth.

Shape legend: N frontier nodes (always 1), d width of the drafter's states, D draft vocabulary,
V target vocabulary, M children.
"""

import torch
from torch import Tensor

from decode.chance import SeededChance
from decode.stop.base import SeenLive, Stop
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.sampling import probabilities


class Chain(Policy):
    """gamma drafts in a row.

    At temperature 0 each is the drafter's argmax. Otherwise each is drawn from q at the serving
    temperature and nucleus, and q is kept for the verifier's min(1, p/q). `temperature: 0` set in
    the tree's own configuration drafts greedily under a sampling target, which is exact as well.
    With `stop` a draft may end earlier, behind a token (decode/stop/base.py).
    """

    def __init__(
        self,
        *,
        gamma: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Stop | None = None,
    ) -> None:
        if gamma < 1:
            raise ValueError(
                f"tree.gamma={gamma} asks for a draft of no tokens, expected 1 or more, because "
                "plain decoding is what the baseline already measures; give a longer chain."
            )
        self.gamma = gamma
        self.temperature = temperature
        self.top_p = top_p
        self.stop = stop
        # A stream apart from the verifier's: the same seed there must not mean the same uniforms.
        self._chance = SeededChance(seed=seed ^ 0x5EED)
        self._one = torch.ones(1)
        self._expand = torch.ones(1, dtype=torch.bool)
        self._parent = torch.zeros(1, dtype=torch.long)
        self._states_Nd = torch.empty(1, 0)

    @property
    def name(self) -> str:
        """The shape in a word, for folders and tables."""
        return f"chain{self.gamma}" + (f"-{self.stop.name}" if self.stop else "")

    def grow(
        self,
        depth: int,
        frontier: Frontier,
        logits_ND: Tensor,
        drafter: Drafter,
    ) -> Children | None:
        """The one child of the one frontier node; None after gamma drafts."""
        if depth == 0:
            self._check(drafter)
            self._one = self._one.to(logits_ND.device)
            self._expand = self._expand.to(logits_ND.device)
            self._parent = self._parent.to(logits_ND.device)
        if depth >= self.gamma:
            return None
        q_MV, draw = None, self._one
        if self.temperature == 0.0:
            drafted = logits_ND.argmax(-1)
        else:
            q_ND = probabilities(logits_ND, temperature=self.temperature, top_p=self.top_p)
            drafted = torch.tensor([self._chance.draw(q_ND[0])], device=logits_ND.device)
            draw = q_ND[0, drafted]
            q_MV = drafter.full_distribution(q_ND)
        # The last draft is not extended: that spares the drafter one step.
        expand = self._expand if depth + 1 < self.gamma else ~self._expand
        if self.stop is not None and self.stop.ends(
            SeenLive(
                depth,
                logits_ND=logits_ND,
                drafted_N=drafted,
                states_Nd=self._states_Nd,
                drafter=drafter,
                judge=self.stop.judge,
            )
        ):
            expand = ~self._expand
        return Children(drafter.to_target_ids(drafted), self._parent, draw, expand, q_MV)

    def begin(self, drafter: Drafter) -> None:
        if self.stop is not None:
            self.stop.begins(drafter, self.gamma)

    def look(self, states_Nd: Tensor) -> None:
        self._states_Nd = states_Nd

    def verified(self, tested: int, accepted: int) -> None:
        if self.stop is not None:
            self.stop.verified(tested, accepted)

    def _check(self, drafter: Drafter) -> None:
        limit = drafter.max_depth
        if limit is not None and self.gamma > limit:
            raise ValueError(
                f"tree.gamma={self.gamma} drafts were asked for, but this drafter makes at most "
                f"{limit}, because it was trained with that many depths; set tree.gamma={limit} or "
                "less."
            )
