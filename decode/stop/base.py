"""What a rule that ends drafts early may look at, and when.

A token that was drawn from q has to be verified: leaving it out because of what it is would bias
the output (with p = q = (0.7, 0.3), refusing to submit the second token gives 0.7 + 0.3 * 0.7 to
the first). A rule is therefore asked *after* a token was drafted, and that token is submitted
whatever the rule says: a draft ends behind it. The answer may then depend on everything that is
fixed by that time, and on nothing later:

- the rows of q that led here, the drafted tokens themselves, a head that reads both;
- what became of earlier drafts (`verified`), because those rounds are over.

Nothing is drawn to decide. Whether the draft goes on is so a function of the text up to the token,
drafted and verified, and verification is exact for any such function.

Shape legend: N rows (always 1), d width of the drafter's states, D draft vocabulary.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from models.acceptance import AcceptanceHead
from models.drafter.base import Drafter


class Seen(Protocol):
    """What is known behind a drafted token. q is taken at temperature 1 over the draft vocabulary,
    whatever the drafts are drawn at, so that a threshold means the same at every temperature."""

    depth: int
    """Of the token, 0-based."""

    @property
    def best(self) -> float:
        """max_v q(v) of the row the token was drawn from."""
        ...

    @property
    def drawn(self) -> float:
        """q of the token."""
        ...

    @property
    def entropy(self) -> float:
        """H(q) of that row, in nats."""
        ...

    @property
    def acceptance(self) -> float:
        """The chance, by the rule's `judge`, that the newest token it can judge is accepted if all
        before are: this token, or (a judge that reads candidates) the one before; 1 where there is
        none yet."""
        ...


class Stop(ABC):
    """Ends a draft behind tokens that are probably wrong.

    A rule may keep what it needs of a draft from depth to depth, and begins anew at depth 0.
    """

    judge: AcceptanceHead | None = None
    """The acceptance head of the drafter, for rules that ask it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The rule in a word, for folders and tables."""

    def begins(self, drafter: Drafter, gamma: int) -> None:
        """A draft of at most `gamma` tokens is about to be made: a rule may choose the exit it
        comes from (`drafter.leave_at`), by what earlier rounds have shown."""
        return

    @abstractmethod
    def ends(self, seen: Seen) -> bool:
        """Whether this token is the last of its draft."""

    def verified(self, tested: int, accepted: int) -> None:
        """What became of the draft: depth k was put to the test when k < tested, and passed when
        k < accepted. Nothing is done unless a rule learns from it."""
        return


class SeenLive:
    """Computed from the drafter's row, each number when a rule asks for it."""

    def __init__(
        self,
        depth: int,
        *,
        logits_ND: Tensor,
        drafted_N: Tensor,
        states_Nd: Tensor,
        drafter: Drafter,
        judge: AcceptanceHead | None,
    ) -> None:
        self.depth = depth
        self._logits_ND, self._drafted_N, self._states_Nd = logits_ND, drafted_N, states_Nd
        self._drafter, self._judge = drafter, judge

    @cached_property
    def logq_D(self) -> Tensor:
        """log q, fp32."""
        return self._logits_ND[0].float().log_softmax(-1)

    @property
    def best(self) -> float:
        return float(self.logq_D.max().exp())

    @property
    def drawn(self) -> float:
        return float(self.logq_D[self._drafted_N[0]].exp())

    @property
    def entropy(self) -> float:
        return float(torch.special.entr(self.logq_D.exp()).sum())

    @property
    def acceptance(self) -> float:
        assert self._judge is not None, "a rule that asks for this names its judge"
        if self.depth < self._judge.lag:
            return 1.0  # there is nothing to judge yet
        return self._judge.chance(self.depth, self.judged)

    @property
    def judged(self) -> float:
        """The judge's logit behind this row, before its T_k."""
        assert self._judge is not None
        logits_N = self._judge.judged(
            self._states_Nd,
            logq_ND=self.logq_D[None],
            drafted_N=self._drafted_N,
            drafter=self._drafter,
        )
        return float(logits_N[0])
