"""End a draft behind the first token the drafter is not sure of (Kangaroo, arXiv 2404.18911).

Shape legend: N frontier nodes, D draft vocabulary.
"""

from torch import Tensor

from decode.stop.base import Stop


class Confidence(Stop):
    """Stop when max_v q(v) < `threshold`, after drafting a token there.

    q = softmax(logits) over the draft vocabulary at temperature 1, whatever the drafts are drawn
    at, so that a threshold means the same at every temperature. In the paper 0.6, with at most six
    drafts.
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

    def ends(self, depth: int, logits_ND: Tensor) -> Tensor:
        """Rows whose most likely token has less than the threshold."""
        return logits_ND.float().softmax(-1).amax(-1) < self.threshold
