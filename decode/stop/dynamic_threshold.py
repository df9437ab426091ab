"""A confidence threshold that follows what was accepted (transformers' dynamic speculation).

Shape legend: P pairs.
"""

from collections import deque

import numpy as np

from decode.stop.base import Seen, Stop


class DynamicThreshold(Stop):
    """Stop when q of the drafted token < t, and choose t anew after every round.

    Every draft that was put to the test gives a pair (q of the token, accepted). When there are 6
    pairs with both outcomes among them, t is the value of q that minimises

        share of rejected drafts with q >= t  +  3 x share of accepted drafts with q < t

    (false positives cost a wasted draft, false negatives a lost token). The token is submitted
    whatever its q: the draft ends behind it. Deviation: the newest `memory` pairs are looked at
    instead of all since the start.
    """

    def __init__(
        self, *, threshold: float = 0.4, miss_cost: float = 3.0, memory: int = 256
    ) -> None:
        if not 0.0 <= threshold <= 1.0 or miss_cost <= 0.0 or memory < 6:
            raise ValueError(
                f"stop.threshold={threshold:g}, stop.miss_cost={miss_cost:g} and stop.memory="
                f"{memory} should be a probability, above 0, and 6 or more (both outcomes are "
                "needed for a choice); give others, or stop=confidence for a fixed threshold."
            )
        self.begin, self.miss_cost, self.memory = threshold, miss_cost, memory
        self.threshold = threshold
        self._pairs: deque[tuple[float, bool]] = deque(maxlen=memory)
        self._drawn: list[float] = []

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return f"dynamic_threshold{self.begin:g}"

    def ends(self, seen: Seen) -> bool:
        """Tokens of less q than the threshold of this round."""
        if seen.depth == 0:
            self._drawn = []
        self._drawn.append(seen.drawn)
        return seen.drawn < self.threshold

    def verified(self, tested: int, accepted: int) -> None:
        self._pairs += [(q, k < accepted) for k, q in enumerate(self._drawn[:tested])]
        passed = np.sort([q for q, good in self._pairs if good])
        failed = np.sort([q for q, good in self._pairs if not good])
        if len(self._pairs) < 6 or not len(passed) or not len(failed):
            return
        tried_P = np.sort([q for q, _ in self._pairs])
        wasted_P = 1.0 - np.searchsorted(failed, tried_P) / len(failed)  # rejected, q >= t
        missed_P = np.searchsorted(passed, tried_P) / len(passed)  # accepted, q < t
        self.threshold = float(tried_P[np.argmin(wasted_P + self.miss_cost * missed_P)])
