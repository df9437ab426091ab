"""What every engine does: run prompts with and without a drafter.

One driver script per engine (`drivers/`), run with the engine's own Python. What it is asked:

    target, draft      folders (draft null: the target alone)
    prompts            token ids; ends: ids that end an answer (kept in it)
    gamma              drafts a round
    max_new_tokens     longest answer
    dtype              float32, bfloat16 or float16
    options            what the engine's class adds

What it answers:

    answers[i].tokens    new token ids
    answers[i].steps     target forwards after the prompt's
    answers[i].rounds    tokens produced by each of them, where the engine shows it, else null
    answers[i].seconds   wall clock of the prompt, its forward included
    counters             the engine's own counts, named and counted as it does (may be empty)
    versions             of the libraries that matter
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from export.engine.environment import Environment
from export.engine.process import call_driver, driver_file

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Answer:
    """One greedy answer: its tokens after the first, round by round.

    The first token comes from the prompt's forward and belongs to no round. `steps` target forwards
    came after that one. `rounds[i]` tokens were produced by forward i of them, the bonus token
    included; the last round counts what the length limit or the end of the answer left of it. None
    where the engine only tells their number.
    """

    tokens: list[int]
    steps: int
    rounds: list[int] | None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.rounds is not None:
            assert len(self.rounds) == self.steps, "a round is a target forward"
            assert sum(self.rounds) == max(0, len(self.tokens) - 1), "rounds make up the answer"


@dataclass(frozen=True)
class Outcome:
    """All prompts through one engine, with one drafter or none."""

    answers: list[Answer]
    counters: dict[str, Any]
    versions: dict[str, str]


class Engine(Environment):
    """A serving engine that runs here."""

    title: ClassVar[str]
    """As its makers write it."""
    driver: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    variables: ClassVar[dict[str, str]] = {}
    """Environment variables that the driver runs with."""
    timeout_s: ClassVar[float] = 3600.0

    def run(
        self,
        *,
        target: Path,
        draft: Path | None,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        gamma: int,
        max_new_tokens: int,
        dtype: Dtype,
    ) -> Outcome:
        """Decode every prompt greedily, one after the other. Installs the engine when needed.

        `target` is a plain transformers folder, `draft` an exported one, `ends` the ids that end an
        answer.
        """
        self.refuse_dtype(dtype)
        self.install()
        with tempfile.TemporaryDirectory(prefix="draftsmith-") as made:
            request = {
                **self.prepare(target, draft, Path(made), dtype),
                "prompts": [list(p) for p in prompts],
                "ends": list(ends),
                "gamma": gamma,
                "max_new_tokens": max_new_tokens,
                "dtype": dtype,
            }
            answered = call_driver(
                self.python,
                driver_file(self.driver),
                request,
                environment=self.variables,
                timeout_s=self.timeout_s,
            )
        return Outcome(
            [Answer(**a) for a in answered["answers"]], answered["counters"], answered["versions"]
        )

    def refuse_dtype(self, dtype: str) -> None:
        """Raise ValueError for a precision that the engine has not here."""
        if dtype not in self.dtypes:
            raise ValueError(
                f"dtype={dtype} was asked for, but {self.title} runs here in "
                f"{' or '.join(self.dtypes)}; give one of them."
            )

    def prepare(
        self, target: Path, draft: Path | None, scratch: Path, dtype: Dtype
    ) -> dict[str, Any]:
        """`target`, `draft` and `options` of the request; `scratch` is there for the run only.

        An engine with a format of its own converts the target here, into the cache.
        """
        return {
            "target": str(target),
            "draft": None if draft is None else str(draft),
            "options": {},
        }
