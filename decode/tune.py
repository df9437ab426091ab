"""Which rule ends drafts best here: predicted from one trace, confirmed by real decoding.

1. The target's answers to the prompts are recorded (decode/answers.py), and the drafter drafts from
   every position of them (decode/trace.py).
2. The real decoder is timed with several chain lengths and without a drafter, and so is a look at
   each number that rules read.
3. Every rule with every setting is played on the trace (decode/simulate.py): tokens per second.
4. The best setting of every rule then decodes for real, in turns on the same prompts.

Both numbers of 4 leave the prompt's forward out: tokens per second of rounds. Plain decoding is
measured in 2 and in 4, and predictions are compared at the pace of 4 (decode/tune_real.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.console import say
from decode.answers import LONGEST, Recording
from decode.calibration import Calibration, Judgements, measured
from decode.interval import Estimate
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
from decode.trace import Trace
from decode.trace_file import kept_trace
from decode.tune_real import Confirmation, confirm, time_rounds
from decode.tune_settings import FIXED, Setting, candidates
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
    confirmed: Confirmation
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
    prompts = [answer.prompt for answer in recording.answers]
    shared: dict[str, Any] = {"target": target, "drafter": drafter, "temperature": T, "seed": seed}
    costs, signal_ms = time_rounds(
        prompts=prompts[: plan.timed_prompts], longest=longest, max_new_tokens=limit, **shared
    )
    cost = costs[-1]
    exits = [Traced(one, its, signal_ms) for one, its in zip(traces, costs, strict=True)]
    learn_lengths(made, cost, longest, run_dir)
    tried = list(candidates(longest, head, run_dir, costs))
    played = {s.words: play(exits, s.make(), gamma=s.gamma) for s in tried}
    fixed = max(
        (s for s in tried if s.rule == FIXED), key=lambda s: tokens_per_s(played[s.words]).value
    )
    predicted = [_predicted(s, played[s.words], played[fixed.words]) for s in tried]
    best = best_of_each(predicted)
    by_words = {s.words: s for s in tried}
    confirmed = Confirmation(1.0, [])
    if plan.confirm_prompts:
        chosen = prompts[: plan.confirm_prompts]
        confirmed = confirm(
            [by_words[p.words] for p in best], played, chosen, fixed, cost, limit, **shared
        )
    return Tuned(
        prompts=len(prompts),
        tokens=sum(w.length for w in made.walked),
        temperature=T,
        gamma=longest,
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        cost=cost,
        signal_ms=signal_ms,
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
            one.trace,
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
