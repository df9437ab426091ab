"""End a draft where the entropy of q leaves little hope (SVIP, arXiv 2411.18462)."""

import math

from decode.stop.base import Seen, Stop


class Svip(Stop):
    """Stop when 1 - sqrt(c H(q)) < `threshold`.

    A draft is accepted with 1 - TV(p, q) >= 1 - sqrt(KL(q, p) / 2) (Pinsker), and KL(q, p) =
    H(q, p) - H(q) is taken as proportional to H(q): the bound is 1 - sqrt(c H(q)) with one number
    `c` for a pair of models.

    Deviation: the paper ends the draft before a token is drawn from such a row. Here the token is
    drawn and submitted, and the draft ends behind it, because its row has been paid for already.
    """

    def __init__(self, *, threshold: float, c: float = 0.25) -> None:
        if not threshold < 1.0 or c <= 0.0:
            raise ValueError(
                f"stop.threshold={threshold:g} and stop.c={c:g} should be below 1 and above 0, "
                "because 1 - sqrt(c H) is compared with the threshold and is at most 1; give "
                "others, or stop=null for whole drafts."
            )
        self.threshold, self.c = threshold, c

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return f"svip{self.threshold:g}"

    def ends(self, seen: Seen) -> bool:
        """Rows whose bound is below the threshold."""
        return 1.0 - math.sqrt(self.c * seen.entropy) < self.threshold
