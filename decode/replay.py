"""A drafter on recorded answers of the target: one drafter forward, several chain lengths at once.

What is computed and why it is exact stands in decode/rounds.py. Definitions are those of
decode/measure.py; intervals are 95 % bootstrap intervals over prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from decode.answers import LONGEST, Recording
from decode.bandwidth import target_bytes
from decode.interval import Estimate, bootstrap, sum_by_depth, tau_by_category, tau_parts
from decode.measure import measure, warm_up
from decode.prompts import Prompt
from decode.rounds import acceptance, expected_counts
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.sampling import Sampling
from models.drafter.base import Drafter, Policy
from models.target import Target


@dataclass(frozen=True)
class ReplayPlan:
    """What the decode command is asked to replay: `gammas` chain lengths, `samples` answers of the
    target to each prompt (more than one only when sampling), and `timed_prompts` decoded for real
    with every chain length to predict the speed-up (0: no prediction)."""

    gammas: list[int]
    samples: int = 1
    timed_prompts: int = 2


@dataclass(frozen=True)
class ReplayRecord:
    """What one prompt gave: expected counts, summed over its answers."""

    id: str
    category: str | None
    new_tokens: int
    rounds: float
    produced: float
    tested_by_depth: list[float]
    accepted_by_depth: list[float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a round of one shape, and of a plain token, by the real decoder."""

    draft_ms: float
    target_ms: float
    verify_ms: float
    plain_ms: float
    plain_target_ms: float | None = None

    @property
    def break_even_tau(self) -> float:
        """Tokens per step at which decoding takes as long with the drafter as without."""
        return (self.draft_ms + self.target_ms + self.verify_ms) / self.plain_ms


@dataclass(frozen=True)
class ChainResult:
    """One chain length. Definitions as in decode/measure.py; rounds are expected numbers.

    `speedup` is a prediction: tau / break_even_tau of `timing`, the prompt's forward left out.
    """

    gamma: int
    tau: Estimate
    tau_by_category: dict[str, Estimate]
    alpha_by_depth: list[float]
    reached_by_depth: list[float]
    rounds: float
    mbsu: float
    draft_bytes: float
    timing: Timing | None
    break_even_tau: float | None
    speedup: Estimate | None
    records: list[ReplayRecord]


@dataclass(frozen=True)
class Replayed:
    """A drafter on one recording.

    `acceptance` is the mean over all answer tokens of a_0, as if every token were a first draft: it
    does not depend on gamma. `best_gamma` has the highest predicted speed-up where rounds were
    timed, else the highest MBSU.
    """

    prompts: int
    samples: int
    tokens: int
    temperature: float
    draft_temperature: float
    seed: int
    max_new_tokens: int
    dtype: str
    device: str
    target_bytes: int
    acceptance: Estimate
    best_gamma: int
    chains: list[ChainResult]

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for json."""
        return asdict(self)

    def chain(self, gamma: int) -> ChainResult:
        """The result of one chain length."""
        return next(c for c in self.chains if c.gamma == gamma)


def replay(
    *,
    target: Target,
    drafter: Drafter,
    recording: Recording,
    gammas: Sequence[int],
    draft_temperature: float | None = None,
    timings: Mapping[int, Timing] | None = None,
    draft_bytes: Mapping[int, float] | None = None,
) -> Replayed:
    """Expected tokens per step on a recording, for several chain lengths at once.

    `draft_temperature` is that of the drafts; None is the recording's own. `draft_bytes` (weight
    bytes of one draft of each length, see `count_draft_bytes`) are counted when not given: drafters
    of one architecture share them.
    """
    check_gammas(drafter, gammas)
    drafts_at = recording.temperature if draft_temperature is None else draft_temperature
    accept_KAJ = acceptance(
        target, drafter, recording, depths=max(gammas), draft_temperature=drafts_at
    )
    lengths = [len(a.tokens) for a in recording.answers]
    limit = recording.max_new_tokens
    firsts = [
        (float(accept_KAJ[0, i, 1 : min(n, limit)].sum()), max(0.0, min(n, limit) - 1.0))
        for i, n in enumerate(lengths)
    ]
    prompt, samples = recording.answers[0].prompt, recording.samples
    read = draft_bytes or count_draft_bytes(target, drafter, gammas, prompt)
    chains = []
    for gamma in sorted(set(gammas)):
        counts = expected_counts(accept_KAJ, lengths, gamma=gamma, max_new_tokens=limit)
        timing = timings.get(gamma) if timings else None
        chains.append(_result(gamma, _by_prompt(counts, recording), target, read[gamma], timing))
    grouped = [
        tuple(sum(pair[c] for pair in firsts[i : i + samples]) for c in (0, 1))
        for i in range(0, len(firsts), samples)
    ]
    return Replayed(
        prompts=len(recording.answers) // samples,
        samples=samples,
        tokens=sum(min(n, limit) for n in lengths),
        temperature=recording.temperature,
        draft_temperature=drafts_at,
        seed=recording.seed,
        max_new_tokens=limit,
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        target_bytes=target_bytes(target),
        acceptance=bootstrap(grouped, lambda pair: pair),
        best_gamma=max(chains, key=lambda c: c.speedup.value if c.speedup else c.mbsu).gamma,
        chains=chains,
    )


def check_gammas(drafter: Drafter, gammas: Sequence[int]) -> None:
    """Refuse chain lengths that this drafter or a recording cannot answer for."""
    if getattr(drafter, "thresholds", None) is not None:
        raise ValueError(
            "This drafter drafts from the first exit that is sure enough (thresholds), while its "
            "training view shows whole exits, so chains cannot be read off it; replay it round by "
            "round (replay=trees tree.temperature=0), or with thresholds null."
        )
    limit = min(LONGEST, drafter.max_depth or LONGEST)
    if not gammas or min(gammas) < 1 or max(gammas) > limit:
        raise ValueError(
            f"replay.gammas={list(gammas)} should be chain lengths from 1 to {limit}, because a "
            f"recording has room for {LONGEST} drafts and this drafter makes "
            f"{'any number' if drafter.max_depth is None else f'at most {drafter.max_depth}'}; "
            "give others."
        )


def time_chains(
    *,
    target: Target,
    drafter: Drafter,
    gammas: Sequence[int],
    prompts: Sequence[Prompt],
    temperature: float = 0.0,
    draft_temperature: float | None = None,
    max_new_tokens: int = 32,
) -> dict[int, Timing]:
    """Time short real decodings of each chain length, plain ones beside them in the same run."""
    check_gammas(drafter, gammas)
    drafts_at = temperature if draft_temperature is None else draft_temperature
    shared: Any = {
        "target": target,
        "drafter": drafter,
        "prompts": prompts,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    chains = {gamma: Chain(gamma=gamma, temperature=drafts_at) for gamma in gammas}
    found = {gamma: time_shape(policy=chain, **shared) for gamma, chain in chains.items()}
    return {gamma: timing for gamma, timing in found.items() if timing is not None}


def time_shape(
    *,
    target: Target,
    drafter: Drafter,
    policy: Policy,
    prompts: Sequence[Prompt],
    temperature: float = 0.0,
    max_new_tokens: int = 32,
) -> Timing | None:
    """Time short real decodings with one shape and plain ones beside them; None if every answer
    was over with its first token."""
    m = measure(
        target=target,
        drafter=drafter,
        policy=policy,
        verifier=Sampling(),
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    if m.plain_ms is None:
        return None
    return Timing(m.draft_ms, m.target_ms, m.verify_ms, m.plain_ms, m.plain_target_ms)


def count_draft_bytes(
    target: Target, drafter: Drafter, gammas: Sequence[int], prompt: Prompt
) -> dict[int, float]:
    """Weight bytes one draft reads, counted in a few real rounds as decode/measure.py does."""
    found = {}
    for gamma in gammas:
        decoder = Decoder(
            target=target, drafter=drafter, verifier=Sampling(), policy=Chain(gamma=gamma)
        )
        found[gamma] = warm_up(decoder, None, drafter, prompt)
    return found


def _by_prompt(counts: Sequence[dict[str, Any]], recording: Recording) -> list[ReplayRecord]:
    """Answers to one prompt depend on each other: their counts are added up."""
    records = []
    for first in range(0, len(counts), recording.samples):
        own = counts[first : first + recording.samples]
        answers = recording.answers[first : first + recording.samples]
        records.append(
            ReplayRecord(
                id=answers[0].prompt.id,
                category=answers[0].prompt.category,
                new_tokens=sum(min(len(a.tokens), recording.max_new_tokens) for a in answers),
                rounds=sum(c["rounds"] for c in own),
                produced=sum(c["produced"] for c in own),
                tested_by_depth=sum_by_depth([c["tested_by_depth"] for c in own]),
                accepted_by_depth=sum_by_depth([c["accepted_by_depth"] for c in own]),
            )
        )
    return records


def _result(
    gamma: int,
    records: list[ReplayRecord],
    target: Target,
    draft_bytes: float,
    timing: Timing | None,
) -> ChainResult:
    tau = bootstrap(records, tau_parts)
    reached = sum_by_depth([r.tested_by_depth for r in records])
    accepted = sum_by_depth([r.accepted_by_depth for r in records])
    c = target_bytes(target)
    return ChainResult(
        gamma=gamma,
        tau=tau,
        tau_by_category=tau_by_category(records),
        alpha_by_depth=[a / r for a, r in zip(accepted, reached, strict=True)],
        reached_by_depth=reached,
        rounds=sum(r.rounds for r in records),
        mbsu=tau.value * c / (c + draft_bytes),
        draft_bytes=draft_bytes,
        timing=timing,
        break_even_tau=timing.break_even_tau if timing else None,
        speedup=tau.divided_by(timing.break_even_tau) if timing else None,
        records=records,
    )
