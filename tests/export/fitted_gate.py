"""The gate on quickly trained drafters of the small target."""

from pathlib import Path

from export.base import Exporter
from export.engine.base import Engine, Outcome
from export.gate import measure
from export.served import Served
from tests.export.fitted import (
    NEW_TOKENS,
    fitted_drafter,
    questions,
    small_target,
    small_target_folder,
)


def alone(engine: Engine) -> Outcome:
    """What the engine writes without drafter."""
    return engine.run(
        target=small_target_folder(),
        draft=None,
        prompts=[q.tokens for q in questions()],
        ends=list(small_target().eos_ids),
        gamma=3,
        max_new_tokens=NEW_TOKENS,
        dtype="float32",
    )


def gate(engine: Engine, exporter: Exporter, family: str, folder: Path, plain: Outcome) -> Served:
    """Export the family's quick drafter into `folder` and let the engine decode with it."""
    drafter = exporter.cast(fitted_drafter(family))
    exporter.write(drafter, folder, texts=[])
    return measure(
        engine,
        folder,
        target_folder=small_target_folder(),
        drafter=drafter,
        target=small_target(),
        prompts=questions(),
        gamma=exporter.chain_length(drafter),
        max_new_tokens=NEW_TOKENS,
        dtype="float32",
        plain=plain,
    )
