"""End a draft when a rejection has become likely (SpecDec++, arXiv 2405.19715)."""

from decode.stop.base import Seen, Stop
from models.acceptance import AcceptanceHead


class SpecDecPp(Stop):
    """Stop when R = 1 - prod_{j <= k} P_j > `threshold`, with P_j by the drafter's acceptance head.

    R is the chance that at least one draft so far will be rejected. Drafting is a decision process
    whose best policy is a threshold on R; it depends on what a draft and a verification cost, so
    tune it (`python -m decode tune=true`). In the paper 0.3, with 2 to 20 drafts: `least` drafts
    are made in any case.
    """

    def __init__(
        self, *, threshold: float = 0.3, least: int = 1, acceptance: AcceptanceHead | None
    ) -> None:
        if not 0.0 < threshold < 1.0 or least < 1:
            raise ValueError(
                f"stop.threshold={threshold:g} and stop.least={least} should lie between 0 and 1 "
                "and at 1 or more, because a probability is compared with the first and the other "
                "counts drafts; give others, or stop=null for whole drafts."
            )
        if acceptance is None:
            raise ValueError(
                "stop=specdec_pp asks the drafter's acceptance head, but this run has none; train "
                "one for it with `python -m train +experiment=specdec_pp start=<this run>` and "
                "decode with the run that makes, or use stop=confidence, which needs none."
            )
        self.threshold, self.least = threshold, least
        self.judge = acceptance
        self._survival = 1.0

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return f"specdec_pp{self.threshold:g}"

    def ends(self, seen: Seen) -> bool:
        """Where the product of chances has fallen below 1 - threshold."""
        before = 1.0 if seen.depth == 0 else self._survival
        self._survival = before * seen.acceptance
        return 1.0 - self._survival > self.threshold and seen.depth + 1 >= self.least
