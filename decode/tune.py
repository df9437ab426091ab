"""Which rule ends drafts best here: predicted from one trace, confirmed by real decoding.

1. The target's answers to the prompts are recorded (decode/answers.py), and the drafter drafts from
   every position of them (decode/trace.py).
2. The real decoder is timed with several chain lengths and without a drafter.
3. Every rule with every setting is played on the trace (decode/simulate.py): tokens per second.
4. The best setting of every rule then decodes for real, in turns on the same prompts.

Both numbers of 4 leave the prompt's forward out: tokens per second of rounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conf.console import say
from decode.answers import LONGEST, Recording
from decode.calibration import Calibration, Judgements, measured
from decode.interval import Estimate, bootstrap
from decode.prompts import Prompt
from decode.session import Decoder, Generation
from decode.simulate import (
    Played,
    RoundCost,
    Traced,
    gain,
    play,
    tau,
    tau_gain,
    tokens_per_s,
    wasted,
)
from decode.stop import spec_kv
from decode.trace import Trace, kept_trace, trace
from decode.tree.chain import Chain
from decode.tune_settings import FIXED, Setting, candidates, from_exit
from decode.verifier.sampling import Sampling
from models.drafter.base import Drafter
from models.target import Target

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""What a draft step costs, in plain tokens, where the prediction is asked about other pairs."""


@dataclass(frozen=True)
class TunePlan:
    """`gamma` is the longest draft, `timed_prompts` are decoded with several lengths to learn the
    costs, `confirm_prompts` with the best setting of every rule (0: nothing is confirmed)."""

    gamma: int = 8
    timed_prompts: int = 3
    confirm_prompts: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.gamma <= LONGEST or self.timed_prompts < 1 or self.confirm_prompts < 0:
            raise ValueError(
                f"tuning.gamma={self.gamma}, tuning.timed_prompts={self.timed_prompts} and "
                f"tuning.confirm_prompts={self.confirm_prompts} should be 1 to {LONGEST} (recorded "
                f"answers go on for {LONGEST} tokens), 1 or more, and 0 or more; give others."
            )


@dataclass(frozen=True)
class Predicted:
    """What the trace says of one setting. `gain` and `tau_gain` compare it, prompt by prompt, with
    the fixed length of the most tokens per second."""

    rule: str
    words: str
    tokens_per_s: Estimate
    tau: Estimate
    drafts_per_step: float
    wasted: Estimate
    gain: Estimate
    tau_gain: Estimate


@dataclass(frozen=True)
class Confirmed:
    """A setting decoded for real, and what the trace had said of the same prompts.

    `difference` is measured / predicted - 1. `gain` compares its tokens per second with those of
    the best fixed length, measured in the same turns.
    """

    rule: str
    words: str
    predicted: float
    measured: Estimate
    difference: float
    tau: Estimate
    gain: Estimate
    speedup: Estimate


@dataclass(frozen=True)
class Tuned:
    """Everything, JSON-able through `as_dict`. `sweep` are pairs (c, gain of the best rule, its
    words) for drafters whose step costs c plain tokens and rules that cost nothing."""

    prompts: int
    tokens: int
    temperature: float
    gamma: int
    dtype: str
    device: str
    cost: RoundCost
    signal_ms: dict[str, float]
    settings: list[Predicted]
    best: list[Predicted]
    confirmed: list[Confirmed]
    sweep: list[tuple[float, Estimate, str]]
    calibration: Calibration | None

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for json."""
        made = asdict(self)
        made["calibration"] = self.calibration.as_dict() if self.calibration else None
        return made


def tune(
    *,
    target: Target,
    drafter: Drafter,
    recording: Recording,
    plan: TunePlan,
    run_dir: Path,
    seed: int = 0,
    on_answer: Callable[[int, float], None] | None = None,
) -> Tuned:
    """Trace, time, play, choose, confirm. Writes what stop=spec_kv needs into `run_dir`."""
    longest = min(plan.gamma, drafter.max_depth or plan.gamma)
    head, T = drafter.acceptance, recording.temperature
    limit = recording.max_new_tokens
    settings: dict[str, Any] = {
        # A head that reads candidates says of the last draft what it knows one row later.
        "gamma": min(longest + (head.lag if head else 0), drafter.max_depth or LONGEST + 1),
        "temperature": T,
        "max_new_tokens": limit,
        "seed": seed,
    }
    answers = recording.answers
    places: list[int | None] = [*range(len(drafter.exit_costs))] or [None]
    traces = []
    for place in places:
        settings["leave_at"] = place
        if place:
            say(f"The same from exit {place}.")
        traces.append(
            kept_trace(target, drafter, answers, run_dir=run_dir, on_answer=on_answer, **settings)
        )
    made = traces[-1]
    # Looking is timed now, beside everything else that is.
    signal_ms = trace(target, drafter, answers[:1], stride=6, **settings).signal_ms
    for one in traces:
        one.signal_ms = signal_ms
    prompts = [answer.prompt for answer in recording.answers]
    shared: dict[str, Any] = {"target": target, "drafter": drafter, "temperature": T, "seed": seed}
    costs = time_rounds(
        prompts=prompts[: plan.timed_prompts], longest=longest, max_new_tokens=limit, **shared
    )
    cost = costs[-1]
    exits = [Traced(one, its) for one, its in zip(traces, costs, strict=True)]
    learn_lengths(made, cost, longest, run_dir)
    tried = list(candidates(longest, head, run_dir, costs))
    played = {s.words: play(exits, s.make(), gamma=s.gamma) for s in tried}
    fixed = max(
        (s for s in tried if s.rule == FIXED), key=lambda s: tokens_per_s(played[s.words]).value
    )
    predicted = [_predicted(s, played[s.words], played[fixed.words]) for s in tried]
    best = best_of_each(predicted)
    by_words = {s.words: s for s in tried}
    confirmed: list[Confirmed] = []
    if plan.confirm_prompts:
        chosen = prompts[: plan.confirm_prompts]
        confirmed = confirm(
            [by_words[p.words] for p in best], played, chosen, fixed, limit, **shared
        )
    return Tuned(
        prompts=len(prompts),
        tokens=sum(w.length for w in made.walked),
        temperature=T,
        gamma=longest,
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        cost=cost,
        signal_ms=made.signal_ms,
        settings=predicted,
        best=best,
        confirmed=confirmed,
        sweep=[_sweep(exits, tried, c) for c in RATIOS],
        calibration=None
        if head is None
        else measured(head, Judgements.of(made), 0, len(made.walked)),
    )


def best_of_each(predicted: Sequence[Predicted]) -> list[Predicted]:
    """The best setting of every rule, the best rule first."""
    found: dict[str, Predicted] = {}
    for one in predicted:
        before = found.get(one.rule)
        if before is None or one.tokens_per_s.value > before.tokens_per_s.value:
            found[one.rule] = one
    return sorted(found.values(), key=lambda p: -p.tokens_per_s.value)


def _predicted(setting: Setting, played: list[Played], fixed: list[Played]) -> Predicted:
    return Predicted(
        rule=setting.rule,
        words=setting.words,
        tokens_per_s=tokens_per_s(played),
        tau=tau(played),
        drafts_per_step=sum(p.drafted for p in played) / max(1.0, sum(p.rounds for p in played)),
        wasted=wasted(played),
        gain=gain(played, fixed),
        tau_gain=tau_gain(played, fixed),
    )


def _sweep(
    exits: Sequence[Traced], settings: Sequence[Setting], c: float
) -> tuple[float, Estimate, str]:
    """The best rule against the best fixed length where a draft step costs c plain tokens (that of
    an earlier exit as much less as it does here)."""
    last = exits[-1].cost.ratio
    other = [
        Traced(
            replace(one.trace, signal_ms={}),
            one.cost.with_ratio(c * one.cost.ratio / last if one is not exits[-1] else c),
        )
        for one in exits
    ]
    played = {
        s.words: play(other, s.make(), gamma=s.gamma)
        for s in settings
        if s.rule not in ("spec_kv", "del_exit")  # they weigh the times they were given
    }
    rates = {words: tokens_per_s(one).value for words, one in played.items()}
    fixed = max((s.words for s in settings if s.rule == FIXED), key=rates.__getitem__)
    best = max((w for w in played if " " in w), key=rates.__getitem__)
    return c, gain(played[best], played[fixed]), best


def learn_lengths(made: Trace, cost: RoundCost, longest: int, run_dir: Path) -> None:
    """Fit the network of stop=spec_kv on the rounds of the trace, and keep it in the run."""
    inputs, accepted = [], []
    for walked in made.walked:
        history = spec_kv.History()
        i = 1
        while i < walked.length:
            best, drawn, entropy, *_ = walked.signals_IKS[i - 1, 0]
            inputs.append([best, drawn, entropy, history.rate])
            passed = min(int(walked.accepted_I[i - 1]), longest)
            accepted.append(passed)
            history.verified(min(int(walked.tested_I[i - 1]), longest), passed)
            i += passed + 1
    net = spec_kv.fit(inputs, accepted, longest)
    spec_kv.save(run_dir / spec_kv.FILE, net, [cost.of(n) for n in range(1, longest + 1)])


def time_rounds(
    *,
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    longest: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[RoundCost]:
    """Mean milliseconds of real rounds with 1, 2, 4, ... drafts, lengths in turns; for each exit
    of a drafter that has several."""
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
    made = in_turns({**decoders, "plain": plain}, prompts, max_new_tokens)
    rounds = [r for answer in made["plain"] for r in answer.rounds]
    plain_s = sum(r.draft_s + r.target_s + r.verify_s for r in rounds)
    plain_ms = 1000.0 * plain_s / max(1, len(rounds))

    def mean_ms(place: int | None, n: int, part: str) -> float:
        rounds = [r for answer in made[place, n] for r in answer.rounds]
        return 1000.0 * sum(getattr(r, part) for r in rounds) / max(1, len(rounds))

    return [
        RoundCost(
            {n: mean_ms(place, n, "draft_s") for n in lengths},
            {n: mean_ms(place, n, "target_s") for n in lengths},
            {n: mean_ms(place, n, "verify_s") for n in lengths},
            plain_ms,
        )
        for place in places
    ]


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


def in_turns(
    decoders: dict[Any, Decoder], prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[Any, list[Generation]]:
    """Every prompt by every decoder. Who goes first rotates, so that a machine that slows down or
    speeds up favours none."""
    names = list(decoders)
    for name in names:
        decoders[name].generate(prompts[0].tokens[:32], max_new_tokens=6, stop_at_eos=False)
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
    max_new_tokens: int,
    *,
    target: Target,
    drafter: Drafter,
    temperature: float,
    seed: int,
) -> list[Confirmed]:
    """Real decodings of these settings and of none, in turns."""
    say(f"Confirming {len(settings)} settings on {len(prompts)} prompts.")
    decoders = {s.words: decoder(target, drafter, s, temperature, seed) for s in settings}
    plain = Decoder(
        target=target, drafter=None, verifier=Sampling(), policy=None, temperature=temperature
    )
    made = in_turns({**decoders, "plain": plain}, prompts, max_new_tokens)
    real = {name: [_counted(answer) for answer in answers] for name, answers in made.items()}
    found = []
    for setting in settings:
        counts = real[setting.words]
        said = tokens_per_s(played[setting.words][: len(prompts)]).value
        rate = bootstrap(counts, lambda c: (c[0], c[2]))
        found.append(
            Confirmed(
                rule=setting.rule,
                words=setting.words,
                predicted=said,
                measured=rate,
                difference=rate.value / said - 1.0,
                tau=bootstrap(counts, lambda c: (c[0], c[1])),
                gain=_rate_ratio(counts, real[fixed.words]),
                speedup=_rate_ratio(counts, real["plain"]),
            )
        )
    return found


def _counted(answer: Generation) -> tuple[float, float, float]:
    """Tokens produced, rounds and seconds behind the prompt."""
    return (
        float(sum(r.produced for r in answer.rounds)),
        float(len(answer.rounds)),
        sum(answer.seconds.values()),
    )


def _rate_ratio(
    one: Sequence[tuple[float, float, float]], other: Sequence[tuple[float, float, float]]
) -> Estimate:
    pairs = list(zip(one, other, strict=True))
    return bootstrap(pairs, lambda pair: (pair[0][0], pair[0][2], pair[1][0], pair[1][2]))
