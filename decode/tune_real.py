"""What a tuning decodes for real: to learn what rounds cost, and to confirm what it predicts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from conf.console import say
from decode.interval import Estimate, bootstrap
from decode.prompts import Prompt
from decode.session import Decoder, Generation
from decode.simulate import Played, RoundCost
from decode.stop.base import Seen, SeenLive, Stop
from decode.tree.chain import Chain
from decode.tune_settings import Setting, from_exit
from decode.verifier.sampling import Sampling
from models.acceptance import AcceptanceHead
from models.drafter.base import Drafter
from models.target import Target


@dataclass(frozen=True)
class Confirmed:
    """A setting decoded for real, and what the trace had said of the same prompts.

    `said` is the prediction with the times of the timing phase, `predicted` the same at the pace
    of the confirming phase (`Confirmation`). `ratio` is measured / predicted, `tau_ratio` what the
    same ratio is of tokens per step alone: greedy texts are those that were traced, sampled ones
    are others. `gain` compares its tokens per second with those of the best fixed length, measured
    in the same turns.
    """

    rule: str
    words: str
    said: float
    predicted: float
    measured: Estimate
    ratio: Estimate
    tau: Estimate
    tau_ratio: Estimate
    gain: Estimate
    speedup: Estimate


@dataclass(frozen=True)
class Confirmation:
    """`pace` is what a plain token took while settings were confirmed, over what it took while
    rounds were timed. A machine's clock moves by several per cent from minute to minute, and the
    prompts that are confirmed are more than those that were timed: both slow a round down by what
    they slow a plain token down."""

    pace: float
    settings: list[Confirmed]


class Watching(Stop):
    """Ends nothing, and times what rules look at while they do in real rounds: behind a forward of
    the target the same look takes longer than in a loop of looks."""

    def __init__(self, judge: AcceptanceHead | None) -> None:
        self.judge = judge
        self.clock: dict[str, list[float]] = {}

    @property
    def name(self) -> str:
        return "watching"

    def ends(self, seen: Seen) -> bool:
        assert isinstance(seen, SeenLive)
        looks: list[tuple[str, Callable[[], Any]]] = [
            ("row", lambda: seen.logq_D),
            ("best", lambda: seen.best),
            ("drawn", lambda: seen.drawn),
            ("entropy", lambda: seen.entropy),
        ]
        if self.judge is not None and seen.depth >= self.judge.lag:
            looks.append(("judged", lambda: seen.acceptance))
        for name, look in looks:
            begin = time.perf_counter()
            look()
            self.clock.setdefault(name, []).append(1000.0 * (time.perf_counter() - begin))
        return False

    @property
    def signal_ms(self) -> dict[str, float]:
        """Mean milliseconds of each look."""
        return {name: fmean(found) for name, found in self.clock.items()}


def time_rounds(
    *,
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    longest: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[list[RoundCost], dict[str, float]]:
    """Mean milliseconds of real rounds with 1, 2, 4, ... drafts, lengths in turns; for each exit
    of a drafter that has several. And of looking at each number of a row."""
    lengths = sorted({1, 2, 4, longest} & set(range(1, longest + 1)))
    say(f"Timing chains of {lengths} drafts on {len(prompts)} prompts.")
    places: list[int | None] = [*range(len(drafter.exit_costs))] or [None]
    decoders = {
        (place, n): decoder(
            target,
            drafter,
            Setting("", "", n, from_exit(place, drafter.exit_costs)),
            temperature,
            seed,
        )
        for place in places
        for n in lengths
    }
    plain = Decoder(
        target=target, drafter=None, verifier=Sampling(), policy=None, temperature=temperature
    )
    watching = Watching(drafter.acceptance)
    watched = decoder(
        target, drafter, Setting("", "", longest, lambda: watching), temperature, seed
    )
    warm_up(target, drafter, prompts[0], longest)
    made = in_turns({**decoders, "plain": plain, "watched": watched}, prompts, max_new_tokens)
    plain_ms = _plain_ms(made["plain"])

    def mean_ms(place: int | None, n: int, part: str) -> float:
        rounds = [r for answer in made[place, n] for r in answer.rounds]
        return 1000.0 * sum(getattr(r, part) for r in rounds) / max(1, len(rounds))

    costs = [
        RoundCost(
            {n: mean_ms(place, n, "draft_s") for n in lengths},
            {n: mean_ms(place, n, "target_s") for n in lengths},
            {n: mean_ms(place, n, "verify_s") for n in lengths},
            plain_ms,
        )
        for place in places
    ]
    return costs, watching.signal_ms


def _plain_ms(answers: Sequence[Generation]) -> float:
    """Milliseconds of a token without a drafter."""
    rounds = [r for answer in answers for r in answer.rounds]
    seconds = sum(r.draft_s + r.target_s + r.verify_s for r in rounds)
    return 1000.0 * seconds / max(1, len(rounds))


def decoder(
    target: Target, drafter: Drafter, setting: Setting, temperature: float, seed: int
) -> Decoder:
    """The real decoder with one setting."""
    policy = Chain(gamma=setting.gamma, temperature=temperature, seed=seed, stop=setting.make())
    return Decoder(
        target=target,
        drafter=drafter,
        verifier=Sampling(),
        policy=policy,
        temperature=temperature,
        seed=seed,
    )


def warm_up(target: Target, drafter: Drafter, prompt: Prompt, gamma: int) -> None:
    """The first forwards of either kind are slow. No rule takes part: some carry on what they have
    seen."""
    for one, policy in ((None, None), (drafter, Chain(gamma=gamma))):
        first = Decoder(target=target, drafter=one, verifier=Sampling(), policy=policy)
        first.generate(prompt.tokens[:32], max_new_tokens=6, stop_at_eos=False)


def in_turns(
    decoders: dict[Any, Decoder], prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[Any, list[Generation]]:
    """Every prompt by every decoder. Who goes first rotates, so that a machine that slows down or
    speeds up favours none."""
    names = list(decoders)
    made: dict[Any, list[Generation]] = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            answer = decoders[name].generate(prompt.tokens, max_new_tokens=max_new_tokens)
            made[name].append(answer)
    return made


def confirm(
    settings: Sequence[Setting],
    played: dict[str, list[Played]],
    prompts: Sequence[Prompt],
    fixed: Setting,
    cost: RoundCost,
    max_new_tokens: int,
    *,
    target: Target,
    drafter: Drafter,
    temperature: float,
    seed: int,
) -> Confirmation:
    """Real decodings of these settings and of none, in turns. `cost` is what the predictions were
    made with."""
    say(f"Confirming {len(settings)} settings on {len(prompts)} prompts.")
    decoders = {s.words: decoder(target, drafter, s, temperature, seed) for s in settings}
    plain = Decoder(
        target=target, drafter=None, verifier=Sampling(), policy=None, temperature=temperature
    )
    warm_up(target, drafter, prompts[0], max(s.gamma for s in settings))
    made = in_turns({**decoders, "plain": plain}, prompts, max_new_tokens)
    pace = _plain_ms(made["plain"]) / cost.plain_ms
    real = {name: [_counted(answer) for answer in answers] for name, answers in made.items()}
    found = []
    for setting in settings:
        counts = real[setting.words]
        traced = [
            (p.produced, p.rounds, p.seconds * pace) for p in played[setting.words][: len(prompts)]
        ]
        rate = bootstrap(traced, lambda c: (c[0], c[2])).value
        found.append(
            Confirmed(
                rule=setting.rule,
                words=setting.words,
                said=rate * pace,
                predicted=rate,
                measured=bootstrap(counts, lambda c: (c[0], c[2])),
                ratio=_ratio(counts, traced, 2),
                tau=bootstrap(counts, lambda c: (c[0], c[1])),
                tau_ratio=_ratio(counts, traced, 1),
                gain=_ratio(counts, real[fixed.words], 2),
                speedup=_ratio(counts, real["plain"], 2),
            )
        )
    return Confirmation(pace, found)


def _counted(answer: Generation) -> tuple[float, float, float]:
    """Tokens produced, rounds and seconds behind the prompt."""
    return (
        float(sum(r.produced for r in answer.rounds)),
        float(len(answer.rounds)),
        sum(answer.seconds.values()),
    )


def _ratio(
    one: Sequence[tuple[float, float, float]],
    other: Sequence[tuple[float, float, float]],
    per: int,
) -> Estimate:
    """Tokens per round (per=1) or per second (per=2), one over the other, prompts paired."""
    pairs = list(zip(one, other, strict=True))
    return bootstrap(pairs, lambda pair: (pair[0][0], pair[0][per], pair[1][0], pair[1][per]))
