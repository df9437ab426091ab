"""What was measured: tokens per step, acceptance by depth, time, and what it would take to pay.

One definition each (see also the report, which repeats them):
    tau       tokens produced per target forward after the prompt, bonus token included
    alpha_k   share of depth-k drafts accepted, given that depth k was reached
    speed-up  seconds per token without the drafter / with it: same decoder, same prompts, same run
    MBSU      tau * c / (c + d), c and d the weight bytes read by one target forward and one draft
Intervals are 95 % bootstrap intervals over prompts, because tokens of one prompt are dependent.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from decode.bandwidth import target_bytes
from decode.interval import Estimate, bootstrap, sum_by_depth, tau_by_category, tau_parts
from decode.losslessness import Comparison, compare
from decode.prompts import Prompt
from decode.session import Decoder, Generation
from decode.siblings import Siblings


@dataclass(frozen=True)
class PromptRecord:
    """One prompt's answer with the drafter (and, for the last two, without)."""

    id: str
    category: str | None
    new_tokens: int
    rounds: int
    produced: int
    nodes: int
    tested_by_depth: list[int]
    accepted_by_depth: list[int]
    prefill_s: float
    draft_s: float
    target_s: float
    verify_s: float
    total_s: float
    plain_new_tokens: int | None
    plain_total_s: float | None


@dataclass(frozen=True)
class Measurement:
    """Everything measured, JSON-able through `as_dict`.

    Milliseconds are per round. `plain_ms` is one round without a drafter: one token. Break-even is
    the tau at which decoding with this drafter, at these costs, would be as fast as without.
    `lossless` compares the two answers token by token, when both are greedy. `beside` holds what
    methods without training gave on the same prompts in the same run. `siblings` is there when the
    drafts at the root were sampled and more than one.
    """

    prompts: int
    tokens: int
    rounds: int
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    shape: str
    lossy: bool
    dtype: str
    device: str
    tau: Estimate
    tau_by_category: dict[str, Estimate]
    alpha_by_depth: list[float]
    reached_by_depth: list[int]
    nodes_per_round: float
    draft_ms: float
    target_ms: float
    verify_ms: float
    plain_ms: float | None
    plain_target_ms: float | None
    speedup: Estimate | None
    tokens_per_s: float
    plain_tokens_per_s: float | None
    break_even_tau: float | None
    mbsu: float
    target_bytes: int
    draft_bytes: float
    lossless: Comparison | None
    records: list[PromptRecord]
    beside: dict[str, "Beside"] = field(default_factory=dict)
    siblings: Siblings | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for json."""
        return asdict(self)


@dataclass(frozen=True)
class Beside:
    """A method without training, measured beside the drafter, and what the drafter adds to it.

    Ratios are the drafter's by the method's, over the same prompts (intervals are paired):
    `tau_ratio` of tokens per step, `speed_ratio` of tokens per second, prompts included.
    """

    measured: Measurement
    tau_ratio: Estimate
    speed_ratio: Estimate


def summarise(
    decoder: Decoder,
    *,
    shape: str,
    draft_bytes: float,
    prompts: Sequence[Prompt],
    made: Sequence[Generation],
    plain: Sequence[Generation] | None,
    max_new_tokens: int,
    seed: int,
) -> Measurement:
    """What one decoder gave, beside plain decoding of the same prompts."""
    target, verifier = decoder.target, decoder.verifier
    without = plain if plain is not None else [None] * len(made)
    records = [_record(*one) for one in zip(prompts, made, without, strict=True)]
    lossless = None
    if plain is not None and decoder.temperature == 0.0 and not verifier.lossy:
        tokens = zip(prompts, made, plain, strict=True)
        lossless = compare(target, [(prompt, a.tokens, b.tokens) for prompt, a, b in tokens])
    rounds = max(1, sum(r.rounds for r in records))
    tau = bootstrap(records, tau_parts)
    draft_ms, target_ms, verify_ms = (
        1000 * sum(getattr(r, part) for r in records) / rounds
        for part in ("draft_s", "target_s", "verify_s")
    )
    plain_ms = plain_target_ms = None
    plain_rounds = [
        (r.target_s + r.draft_s + r.verify_s, r.target_s) for a in plain or [] for r in a.rounds
    ]
    if plain_rounds:
        plain_ms, plain_target_ms = (1000 * float(x) for x in np.mean(plain_rounds, axis=0))
    reached = [int(n) for n in sum_by_depth([r.tested_by_depth for r in records])]
    accepted = sum_by_depth([r.accepted_by_depth for r in records])
    tokens, seconds = sum(r.new_tokens for r in records), sum(r.total_s for r in records)
    c = target_bytes(target)
    return Measurement(
        prompts=len(records),
        tokens=tokens,
        rounds=rounds,
        temperature=decoder.temperature,
        top_p=decoder.top_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        shape=shape,
        lossy=verifier.lossy,
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        tau=tau,
        tau_by_category=tau_by_category(records),
        alpha_by_depth=[a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)],
        reached_by_depth=reached,
        nodes_per_round=sum(r.nodes for r in records) / rounds,
        draft_ms=draft_ms,
        target_ms=target_ms,
        verify_ms=verify_ms,
        plain_ms=plain_ms,
        plain_target_ms=plain_target_ms,
        speedup=bootstrap(records, _speed_parts) if plain is not None else None,
        tokens_per_s=tokens / seconds,
        plain_tokens_per_s=_plain_rate(records) if plain is not None else None,
        break_even_tau=(draft_ms + target_ms + verify_ms) / plain_ms if plain_ms else None,
        mbsu=tau.value * c / (c + draft_bytes),
        target_bytes=c,
        draft_bytes=draft_bytes,
        lossless=lossless,
        records=records,
    )


def _speed_parts(r: PromptRecord) -> tuple[float, ...]:
    """Seconds per token without / with: answers may differ in length when they are sampled."""
    assert r.plain_total_s is not None
    assert r.plain_new_tokens is not None
    return r.plain_total_s, r.plain_new_tokens, r.total_s, r.new_tokens


def _plain_rate(records: Sequence[PromptRecord]) -> float:
    seconds = sum(r.plain_total_s or 0.0 for r in records)
    return sum(r.plain_new_tokens or 0 for r in records) / seconds


def _record(prompt: Prompt, made: Generation, plain: Generation | None) -> PromptRecord:
    deepest = max((r.tested for r in made.rounds), default=0)
    seconds = made.seconds
    return PromptRecord(
        id=prompt.id,
        category=prompt.category,
        new_tokens=len(made.tokens),
        rounds=len(made.rounds),
        produced=sum(r.produced for r in made.rounds),
        nodes=sum(r.nodes for r in made.rounds),
        tested_by_depth=[sum(r.tested > k for r in made.rounds) for k in range(deepest)],
        accepted_by_depth=[sum(r.accepted > k for r in made.rounds) for k in range(deepest)],
        prefill_s=made.prefill_s,
        draft_s=seconds["draft"],
        target_s=seconds["target"],
        verify_s=seconds["verify"],
        total_s=made.total_s,
        plain_new_tokens=len(plain.tokens) if plain is not None else None,
        plain_total_s=plain.total_s if plain is not None else None,
    )


def compare_with(found: Measurement, other: Measurement) -> Beside:
    """A drafter's measurement and a method's, prompt by prompt."""
    pairs = list(zip(found.records, other.records, strict=True))
    return Beside(other, bootstrap(pairs, _tau_pair), bootstrap(pairs, _speed_pair))


def _tau_pair(pair: tuple[PromptRecord, PromptRecord]) -> tuple[float, ...]:
    """Tokens per step of one / of the other."""
    return *tau_parts(pair[0]), *tau_parts(pair[1])


def _speed_pair(pair: tuple[PromptRecord, PromptRecord]) -> tuple[float, ...]:
    """Tokens per second of one / of the other."""
    return pair[0].new_tokens, pair[0].total_s, pair[1].new_tokens, pair[1].total_s
