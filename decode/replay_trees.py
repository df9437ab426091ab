"""A drafter and a deterministic draft shape on recorded answers: no decoding by the target.

What is computed and why it is exact stands in decode/walk.py. Definitions are those of
decode/measure.py; intervals are 95 % bootstrap intervals over prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from decode.answers import Recorded, Recording
from decode.bandwidth import target_bytes
from decode.baselines.base import Baseline
from decode.interval import Estimate, bootstrap, sum_by_depth, tau_by_category, tau_parts
from decode.measure import warm_up
from decode.replay import Timing
from decode.session import Decoder, Round
from decode.verifier.sampling import Sampling
from decode.walk import check_draft, walk
from models.drafter.base import Drafter, Policy
from models.target import Target


@dataclass(frozen=True)
class TreePlan:
    """What the decode command is asked to replay: `samples` answers of the target to each prompt
    (more than one only when sampling), and `timed_prompts` decoded for real to predict the speed-up
    (0: no prediction)."""

    samples: int = 1
    timed_prompts: int = 2


@dataclass(frozen=True)
class TreeRecord:
    """What one prompt gave, summed over its answers."""

    id: str
    category: str | None
    new_tokens: int
    rounds: int
    produced: int
    nodes: int
    tested_by_depth: list[float]
    accepted_by_depth: list[float]
    draft_s: float


@dataclass(frozen=True)
class TreeReplayed:
    """One drafter, one shape, one recording. Definitions as in decode/measure.py.

    `drafting_ms` is the drafter's time a round over all replayed rounds. The parts of a round that
    are compared with each other come from `timing`, short real decodings; `speedup` is a
    prediction, tau / its break-even tau, the prompt's forward left out.
    """

    prompts: int
    samples: int
    tokens: int
    rounds: int
    temperature: float
    seed: int
    max_new_tokens: int
    shape: str
    dtype: str
    device: str
    tau: Estimate
    tau_by_category: dict[str, Estimate]
    alpha_by_depth: list[float]
    reached_by_depth: list[int]
    nodes_per_round: float
    drafting_ms: float
    timing: Timing | None
    break_even_tau: float | None
    speedup: Estimate | None
    mbsu: float
    target_bytes: int
    draft_bytes: float
    records: list[TreeRecord]

    lossy = False

    @property
    def draft_ms(self) -> float:
        """Of the timed rounds, where there are any."""
        return self.timing.draft_ms if self.timing else self.drafting_ms

    @property
    def target_ms(self) -> float | None:
        return self.timing.target_ms if self.timing else None

    @property
    def verify_ms(self) -> float | None:
        return self.timing.verify_ms if self.timing else None

    @property
    def plain_ms(self) -> float | None:
        return self.timing.plain_ms if self.timing else None

    @property
    def plain_target_ms(self) -> float | None:
        return self.timing.plain_target_ms if self.timing else None

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for json."""
        return asdict(self)


def replay_tree(
    *,
    target: Target,
    drafter: Drafter | Baseline,
    policy: Policy | None,
    recording: Recording,
    timing: Timing | None = None,
    on_prompt: Callable[[int, float], None] | None = None,
) -> TreeReplayed:
    """Walk along every recorded answer. `on_prompt(done, tau so far)` reports progress.

    A method without training has no policy: its drafts have a shape of their own.
    """
    first = recording.answers[0].prompt
    check_draft(target, drafter, policy, first.tokens)
    draft_bytes = 0.0
    if isinstance(drafter, Drafter):
        decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=policy)
        draft_bytes = warm_up(decoder, None, drafter, first)
    records: list[TreeRecord] = []
    limit, samples = recording.max_new_tokens, recording.samples
    for start in range(0, len(recording.answers), samples):
        answers = recording.answers[start : start + samples]
        rounds = [
            round_
            for answer in answers
            for round_ in walk(target, drafter, policy, answer, max_new_tokens=limit)
        ]
        records.append(_record(answers, rounds, limit))
        if on_prompt is not None:
            made = max(1, sum(r.rounds for r in records))
            on_prompt(len(records), sum(r.produced for r in records) / made)
    tau = bootstrap(records, tau_parts)
    rounds = max(1, sum(r.rounds for r in records))
    reached = [int(n) for n in sum_by_depth([r.tested_by_depth for r in records])]
    accepted = sum_by_depth([r.accepted_by_depth for r in records])
    c = target_bytes(target)
    return TreeReplayed(
        prompts=len(records),
        samples=samples,
        tokens=sum(r.new_tokens for r in records),
        rounds=rounds,
        temperature=recording.temperature,
        seed=recording.seed,
        max_new_tokens=limit,
        shape=drafter.name if isinstance(drafter, Baseline) else getattr(policy, "name", ""),
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        tau=tau,
        tau_by_category=tau_by_category(records),
        alpha_by_depth=[a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)],
        reached_by_depth=reached,
        nodes_per_round=sum(r.nodes for r in records) / rounds,
        drafting_ms=1000 * sum(r.draft_s for r in records) / rounds,
        timing=timing,
        break_even_tau=timing.break_even_tau if timing else None,
        speedup=tau.divided_by(timing.break_even_tau) if timing else None,
        mbsu=tau.value * c / (c + draft_bytes),
        target_bytes=c,
        draft_bytes=draft_bytes,
        records=records,
    )


def _record(answers: Sequence[Recorded], rounds: Sequence[Round], limit: int) -> TreeRecord:
    deepest = max((r.tested for r in rounds), default=0)
    return TreeRecord(
        id=answers[0].prompt.id,
        category=answers[0].prompt.category,
        new_tokens=sum(min(len(a.tokens), limit) for a in answers),
        rounds=len(rounds),
        produced=sum(r.produced for r in rounds),
        nodes=sum(r.nodes for r in rounds),
        tested_by_depth=[float(sum(r.tested > k for r in rounds)) for k in range(deepest)],
        accepted_by_depth=[float(sum(r.accepted > k for r in rounds)) for k in range(deepest)],
        draft_s=sum(r.draft_s for r in rounds),
    )
