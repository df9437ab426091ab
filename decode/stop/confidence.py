"""End a draft behind the first token the drafter is not sure of (Kangaroo, arXiv 2404.18911)."""

from decode.stop.base import Seen, Stop


class Confidence(Stop):
    """Stop when max_v q(v) < `threshold`, after drafting a token there.

    In the paper 0.6, with at most six drafts.
    """

    def __init__(self, *, threshold: float) -> None:
        if not 0.0 < threshold <= 1.0:
            raise ValueError(
                f"stop.threshold={threshold:g} should lie above 0 and at most at 1, because it is "
                "compared with a probability; give another one, or stop=null for whole drafts."
            )
        self.threshold = threshold

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return f"confidence{self.threshold:g}"

    def ends(self, seen: Seen) -> bool:
        """Rows whose most likely token has less than the threshold."""
        return seen.best < self.threshold
