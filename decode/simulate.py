"""The rounds that a rule would make, and their time, from a trace: no model runs.

A trace (decode/trace.py) holds a whole draft from every position. A rule is asked behind each of
its tokens, as by the decoder; where it ends the draft after n tokens, the first min(accepted, n)
are kept and the next round begins there. Its time is

    t(n) = draft(n) + target(n + 1) + verify(n) + what the rule looked at,

with the first three measured by the real decoder for several n (straight lines between them). A
drafter with several exits has a trace and times of each.

Shape legend: S signals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from decode.interval import Estimate, bootstrap, tau_parts
from decode.stop.base import Stop
from decode.trace import SIGNALS, Trace
from decode.tree.cost import along
from models.acceptance import AcceptanceHead


@dataclass(frozen=True)
class RoundCost:
    """Mean milliseconds by number of drafts (`target_ms` too: it reads one token more), and of a
    plain token."""

    draft_ms: dict[int, float]
    target_ms: dict[int, float]
    verify_ms: dict[int, float]
    plain_ms: float

    def of(self, drafts: int) -> float:
        """Milliseconds of a round without a rule."""
        parts = (self.draft_ms, self.target_ms, self.verify_ms)
        return sum(along(part, drafts) for part in parts)

    @property
    def step_ms(self) -> float:
        """Milliseconds of one more draft."""
        low, high = min(self.draft_ms), max(self.draft_ms)
        return (self.draft_ms[high] - self.draft_ms[low]) / max(1, high - low)

    @property
    def ratio(self) -> float:
        """One more draft, in plain tokens of the target."""
        return self.step_ms / self.plain_ms

    def with_ratio(self, c: float) -> "RoundCost":
        """The same target with a drafter whose every step costs c plain tokens, and no other
        cost: what another pair of models would pay."""
        draft_ms = {n: n * c * self.plain_ms for n in self.draft_ms}
        return RoundCost(draft_ms, self.target_ms, self.verify_ms, self.plain_ms)


class SeenTraced:
    """A traced token, as a rule sees it; notes what the rule looks at."""

    def __init__(self, depth: int, row_S: np.ndarray, judge: AcceptanceHead | None) -> None:
        self.depth, self._row_S, self._judge = depth, row_S, judge
        self.looked: set[str] = set()

    def _look(self, name: str) -> float:
        self.looked |= {"row", name}
        return float(self._row_S[SIGNALS.index(name)])

    @property
    def best(self) -> float:
        return self._look("best")

    @property
    def drawn(self) -> float:
        return self._look("drawn")

    @property
    def entropy(self) -> float:
        return self._look("entropy")

    @property
    def acceptance(self) -> float:
        assert self._judge is not None
        if self.depth < self._judge.lag:
            return 1.0
        return self._judge.chance(self.depth, self._look("judged"))


@dataclass(frozen=True)
class Played:
    """One prompt under one rule. `drafted` counts drafts made, `accepted` those kept."""

    id: str
    rounds: float
    produced: float
    drafted: float
    accepted: float
    seconds: float
    category: str | None = None
    tested_by_depth: tuple[float, ...] = ()
    accepted_by_depth: tuple[float, ...] = ()


@dataclass(frozen=True)
class Traced:
    """The same answers drafted from one exit, what rounds with its drafts cost, and milliseconds of
    looking at each number of a row (`SeenTraced.looked`)."""

    trace: Trace
    cost: RoundCost
    signal_ms: dict[str, float] = field(default_factory=dict)


@dataclass
class Told:
    """In the drafter's place: a rule names an exit."""

    leave_at: int | None = None


def play(exits: Sequence[Traced], stop: Stop | None, *, gamma: int) -> list[Played]:
    """Every answer, one after the other, under one rule. The last exit drafts unless it names
    another."""
    assert all(gamma <= one.trace.gamma for one in exits), "a trace has no drafts of this length"
    return [_answer(exits, number, stop, gamma) for number in range(len(exits[-1].trace.walked))]


def _answer(exits: Sequence[Traced], number: int, stop: Stop | None, gamma: int) -> Played:
    answer = exits[-1].trace.walked[number]
    i, end = 1, answer.length
    rounds = produced = drafted = kept = 0
    ms = 0.0
    while i < end:
        at, told = i - 1, Told()
        if stop is not None:
            stop.begins(told, gamma)  # type: ignore[arg-type]
        one = exits[-1 if told.leave_at is None else told.leave_at]
        walked = one.trace.walked[number]
        assert walked.starts_I[at] == i, "a trace with stride 1 is needed"
        length, looking_ms = _length(one, walked.signals_IKS[at], stop, gamma)
        accepted = min(int(walked.accepted_I[at]), length)
        tested = min(int(walked.tested_I[at]), length)
        ended = bool(walked.ends_I[at]) and accepted == walked.accepted_I[at]
        if stop is not None:
            stop.verified(tested, accepted)
        gained = accepted + int(not ended)
        rounds, produced = rounds + 1, produced + gained
        drafted, kept = drafted + length, kept + accepted
        ms += one.cost.of(length) + looking_ms
        i = end if ended else i + gained
    return Played(answer.prompt_id, rounds, produced, drafted, kept, ms / 1000.0)


def _length(one: Traced, row_KS: np.ndarray, stop: Stop | None, gamma: int) -> tuple[int, float]:
    """How many tokens are drafted, and the milliseconds of looking at them."""
    if stop is None:
        return gamma, 0.0
    total = 0.0
    for depth in range(gamma):
        seen = SeenTraced(depth, row_KS[depth], stop.judge)
        ends = stop.ends(seen)
        total += sum(one.signal_ms.get(name, 0.0) for name in seen.looked)
        if ends:
            return depth + 1, total
    return gamma, total


def tokens_per_s(played: Sequence[Played]) -> Estimate:
    """Tokens per second after the prompt, with its interval over prompts."""
    return bootstrap(played, lambda p: (p.produced, p.seconds))


def tau(played: Sequence[Played]) -> Estimate:
    """Tokens per step, bonus included."""
    return bootstrap(played, tau_parts)


def wasted(played: Sequence[Played]) -> Estimate:
    """The share of drafts that were not kept."""
    return bootstrap(played, lambda p: (p.drafted - p.accepted, p.drafted))


def gain(played: Sequence[Played], other: Sequence[Played]) -> Estimate:
    """Tokens per second of one over the other, prompts paired."""
    pairs = list(zip(played, other, strict=True))
    return bootstrap(
        pairs, lambda pair: (pair[0].produced, pair[0].seconds, pair[1].produced, pair[1].seconds)
    )


def tau_gain(played: Sequence[Played], other: Sequence[Played]) -> Estimate:
    """Tokens per step of one over the other, prompts paired."""
    pairs = list(zip(played, other, strict=True))
    return bootstrap(pairs, lambda pair: (*tau_parts(pair[0]), *tau_parts(pair[1])))
