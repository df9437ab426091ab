"""transformers' assisted generation inside the test's own process, on targets in memory."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.prompts import Prompt
from export.engine.base import Answer, Dtype, Outcome
from export.engine.drivers.transformers_driver import decode
from export.engine.transformers import Transformers
from export.gate import measure
from export.plain import PlainModel
from export.served import Served
from models.drafter.base import Drafter
from models.target import Target


class InProcess(Transformers):
    """The driver's own function, without the seconds that another process takes to start."""

    def __init__(self, target: Target) -> None:
        self.target = target

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
        assistant = None if draft is None else PlainModel(draft, self.target.device).model
        answers = decode(
            self.target.model,
            assistant,
            prompts=[list(p) for p in prompts],
            ends=ends,
            max_new_tokens=max_new_tokens,
        )
        return Outcome([Answer(**a) for a in answers], {}, {"transformers": self.version})


def measure_here(
    folder: Path,
    *,
    drafter: Drafter,
    target: Target,
    prompts: Sequence[Prompt],
    gamma: int,
    max_new_tokens: int,
) -> Served:
    """The gate, judged."""
    served = measure(
        InProcess(target),
        folder,
        target_folder=Path("in memory"),
        drafter=drafter,
        target=target,
        prompts=prompts,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        dtype="float32",
        timed=True,  # nothing is kept in the cache
    )
    served.insist()
    return served
