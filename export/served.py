"""What a real engine gave with an export, beside the reference decoder on the same prompts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from export.engine.base import Answer, Outcome

TOLERANCE = 0.02
"""Relative difference of tokens per step from which something is wrong."""


@dataclass(frozen=True)
class Along:
    """Our drafter along an answer: tokens of every round, and the first token (its place in the
    answer) that our target would not have written; None when it would have written all."""

    rounds: list[int]
    differs_at: int | None


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. `own_text`: with the drafter the engine wrote what it writes without.
    `differs_at` is where our target would have written another token. `rounds` is None where the
    engine only tells how many there were (`steps`); `reference_rounds` are ours along the engine's
    text, `decoder_rounds` our decoder's where it decoded the prompt into the same text."""

    id: str
    tokens: int
    own_text: bool
    differs_at: int | None
    steps: int
    rounds: list[int] | None
    reference_rounds: list[int]
    decoder_rounds: list[int] | None
    plain_s: float
    drafted_s: float


@dataclass(frozen=True)
class Served:
    """tau is the tokens produced per target forward after the prompt, bonus token included, over
    all prompts together. The engine's stands beside ours along the very text that the engine wrote,
    so that a text that ours would not write (another kernel rounds otherwise) is no difference.
    `accepted_by_depth` counts the rounds that kept a draft of depth k (0-based), what the length
    limit cut off left out. Seconds are wall clock, prompt forwards included; they say something
    when both runs were `timed` one after the other."""

    engine: str
    versions: dict[str, str]
    gamma: int
    max_new_tokens: int
    dtype: str
    tokens: int
    engine_tau: float
    reference_tau: float
    engine_accepted_by_depth: list[int] | None
    reference_accepted_by_depth: list[int]
    counters: dict[str, Any]
    timed: bool
    records: list[PromptRecord]

    @property
    def prompts(self) -> int:
        return len(self.records)

    @property
    def own_texts(self) -> int:
        """Prompts answered as the engine answers alone."""
        return sum(r.own_text for r in self.records)

    @property
    def same_texts(self) -> int:
        """Prompts answered as our target would have."""
        return sum(r.differs_at is None for r in self.records)

    @property
    def same_rounds(self) -> int:
        """Prompts with the same number of tokens in every single round."""
        return sum(
            r.steps == len(r.reference_rounds)
            if r.rounds is None
            else r.rounds == r.reference_rounds
            for r in self.records
        )

    @property
    def difference(self) -> float:
        """Of the engine's tau, relative to ours along the same text."""
        return self.engine_tau / self.reference_tau - 1.0

    @property
    def speedup(self) -> float | None:
        """Wall clock without the drafter over wall clock with it; None when not timed."""
        if not self.timed:
            return None
        return sum(r.plain_s for r in self.records) / sum(r.drafted_s for r in self.records)

    def sentence(self) -> str:
        """The result in words."""
        speedup = "" if self.speedup is None else f"; {self.speedup:.2f} times as fast as without"
        return (
            f"{self.engine} ({_versions(self.versions)}): {self.engine_tau:.4f} tokens per step "
            f"(bonus included), reference decoder {self.reference_tau:.4f} along the same text, "
            f"difference {self.difference:+.2%}; greedy chains of {self.gamma}, {self.prompts} "
            f"prompts, {self.tokens} new tokens, {self.dtype}; {self.own_texts} of {self.prompts} "
            f"texts are the engine's own without drafter, {self.same_texts} also what our target "
            f"writes, {self.same_rounds} of {self.prompts} prompts went through equal rounds"
            f"{speedup}"
        )

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (what, engine, reference)."""
        counted = self.engine_accepted_by_depth
        rows = [("tokens per step", f"{self.engine_tau:.4f}", f"{self.reference_tau:.4f}")]
        for depth, ours in enumerate(self.reference_accepted_by_depth):
            theirs = "not shown" if counted is None else f"{counted[depth]}"
            rows.append((f"accepted at depth {depth + 1}", theirs, f"{ours}"))
        steps = sum(r.steps for r in self.records)
        ours_steps = sum(len(r.reference_rounds) for r in self.records)
        return [*rows, ("rounds", f"{steps}", f"{ours_steps}")]

    def apart(self) -> list[str]:
        """A sentence for each prompt that the engine answered otherwise."""
        found = []
        for r in self.records:
            if not r.own_text:
                found.append(f"{r.id}: with the drafter another text than without.")
            elif r.differs_at is not None:
                found.append(
                    f"{r.id}: our target would have written another token {r.differs_at + 1} "
                    "(kernels round differently); our rounds are read along the engine's text."
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for json."""
        return {
            **asdict(self),
            "prompts": self.prompts,
            "own_texts": self.own_texts,
            "same_texts": self.same_texts,
            "same_rounds": self.same_rounds,
            "difference": self.difference,
            "speedup": self.speedup,
        }

    def insist(self) -> None:
        """Raise ValueError when a text changed or the tokens per step differ.

        Texts are insisted on in float32 only: in half precision a forward over one token and one
        over several break near-ties of the target's logits differently in every engine.
        """
        if self.dtype == "float32" and self.own_texts < self.prompts:
            raise ValueError(
                f"With the export as its drafter {self.engine} wrote another text than alone for "
                f"{self.prompts - self.own_texts} of {self.prompts} prompts, expected none in "
                "greedy decoding, because a drafter may only change the speed; nothing was "
                f"exported. {' '.join(self.apart())} If it stays with another drafter, report it "
                "to the engine."
            )
        for r in self.records:
            if self.dtype == "float32" and r.decoder_rounds not in (None, r.reference_rounds):
                raise ValueError(
                    f"Our decoder goes through the rounds {r.decoder_rounds} on prompt '{r.id}', "
                    f"and through {r.reference_rounds} where its drafter only follows the same "
                    "text, expected the same; nothing was exported, because tokens per step are "
                    "then not known. Please report it with the run."
                )
        if abs(self.difference) > TOLERANCE:
            raise ValueError(
                f"{self.sentence()}: more than {TOLERANCE:.0%} apart, although both read the same "
                "text with the same drafter; nothing was exported, because users would get another "
                "speed than was measured. The exporter for this format is wrong, or the engine "
                "reads the format otherwise than docs/engines.md says."
            )


def served(
    *,
    engine: str,
    ids: Sequence[str],
    plain: Outcome,
    drafted: Outcome,
    along: Sequence[Along],
    decoder: Sequence[Answer],
    gamma: int,
    max_new_tokens: int,
    dtype: str,
    timed: bool = False,
) -> Served:
    """Put them side by side: the engine alone and with the drafter, our rounds along its text, and
    our decoder's answers to the first prompts."""
    decoded = [*decoder, *[None] * (len(ids) - len(decoder))]
    records = [
        PromptRecord(
            id=name,
            tokens=len(with_.tokens),
            own_text=with_.tokens == alone.tokens,
            differs_at=ours.differs_at,
            steps=with_.steps,
            rounds=with_.rounds,
            reference_rounds=ours.rounds,
            decoder_rounds=made.rounds if made and made.tokens == with_.tokens else None,
            plain_s=alone.seconds,
            drafted_s=with_.seconds,
        )
        for name, alone, with_, ours, made in zip(
            ids, plain.answers, drafted.answers, along, decoded, strict=True
        )
    ]
    produced = sum(max(0, r.tokens - 1) for r in records)
    shown = [r.rounds for r in records if r.rounds is not None]
    return Served(
        engine=engine,
        versions=drafted.versions,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        tokens=sum(r.tokens for r in records),
        engine_tau=_tau(produced, sum(r.steps for r in records)),
        reference_tau=_tau(produced, sum(len(r.reference_rounds) for r in records)),
        engine_accepted_by_depth=_by_depth(shown, gamma) if len(shown) == len(records) else None,
        reference_accepted_by_depth=_by_depth([r.reference_rounds for r in records], gamma),
        counters=drafted.counters,
        timed=timed,
        records=records,
    )


def _by_depth(rounds: Sequence[list[int]], gamma: int) -> list[int]:
    """Rounds that kept a draft of depth k: those that produced more than k + 1 tokens."""
    return [sum(n > k + 1 for own in rounds for n in own) for k in range(gamma)]


def _tau(produced: int, steps: int) -> float:
    if not steps:
        raise ValueError(
            "Every answer ended with its first token, so no round was decoded and there are no "
            "tokens per step to compare; give more prompts (prompts=), longer answers "
            "(max_new_tokens=) or another bench."
        )
    return produced / steps


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
