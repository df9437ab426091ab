"""What a real engine gave with an export, beside the reference decoder on the same prompts."""

from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 0.02
"""Relative difference of tokens per step from which something is wrong."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer: its tokens after the first, round by round.

    The first token comes from the prompt's forward and belongs to no round. `rounds[i]` tokens were
    produced by target forward i after that, the bonus token included; the last round counts what
    the length limit or the end of the answer left of it.
    """

    tokens: list[int]
    rounds: list[int]


@dataclass(frozen=True)
class Served:
    """tau is the tokens produced per target forward after the prompt, bonus token included, over
    all prompts together. `identical` answers equal the target's alone; `same_rounds` prompts gave
    the same number of tokens in every single round as in the reference decoder."""

    engine: str
    prompts: int
    tokens: int
    gamma: int
    max_new_tokens: int
    dtype: str
    identical: int
    same_rounds: int
    engine_tau: float
    reference_tau: float

    @property
    def difference(self) -> float:
        """Of the engine's tau, relative to the reference decoder's."""
        return self.engine_tau / self.reference_tau - 1.0

    def sentence(self) -> str:
        """The result in words."""
        return (
            f"{self.engine}: {self.engine_tau:.4f} tokens per step (bonus included), reference "
            f"decoder {self.reference_tau:.4f}, difference {self.difference:+.2%}; greedy chains "
            f"of {self.gamma}, {self.prompts} prompts, {self.tokens} new tokens, {self.dtype}; "
            f"{self.identical} of {self.prompts} texts are the target's own, {self.same_rounds} of "
            f"{self.prompts} prompts went through equal rounds"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain containers for json."""
        return {**asdict(self), "difference": self.difference}

    def insist(self) -> None:
        """Raise ValueError when a text or the tokens per step differ."""
        if self.identical < self.prompts:
            raise ValueError(
                f"With the export as its drafter {self.engine} wrote another text than the target "
                f"alone for {self.prompts - self.identical} of {self.prompts} prompts, expected "
                "none in greedy decoding, because a drafter may only change the speed; nothing was "
                "exported. Compare in fp32, and if it stays report it to the engine."
            )
        if abs(self.difference) > TOLERANCE:
            raise ValueError(
                f"{self.sentence()}: more than {TOLERANCE:.0%} apart, although both decode the "
                "same prompts with the same drafts; nothing was exported, because users would get "
                "another speed than was measured. The exporter for this format is wrong."
            )


def served(
    *,
    engine: str,
    alone: list[list[int]],
    answers: list[Answer],
    reference: list[Answer],
    gamma: int,
    max_new_tokens: int,
    dtype: str,
) -> Served:
    """Put the three decodings of the same prompts side by side."""
    both = list(zip(alone, answers, reference, strict=True))
    return Served(
        engine=engine,
        prompts=len(both),
        tokens=sum(len(a.tokens) for a in answers),
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        identical=sum(plain == a.tokens == r.tokens for plain, a, r in both),
        same_rounds=sum(a.rounds == r.rounds for _, a, r in both),
        engine_tau=_tau(answers),
        reference_tau=_tau(reference),
    )


def _tau(answers: list[Answer]) -> float:
    rounds = sum(len(a.rounds) for a in answers)
    if not rounds:
        raise ValueError(
            "Every answer ended with its first token, so no round was decoded and there are no "
            "tokens per step to compare; give more prompts (measure=), longer answers "
            "(max_new_tokens=) or another bench."
        )
    return sum(sum(a.rounds) for a in answers) / rounds
