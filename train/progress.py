"""How far Lightning's loops are, when a run goes on with another number of processes."""

from typing import Any


def count_again(fit_loop: dict[str, Any], batches: int) -> None:
    """Set the micro-batches done in a saved fit loop to those a process would have done here.

    A checkpoint is saved behind the last micro-batch of a step, before Lightning counts it as
    completed: `completed` may be one behind the others. Optimizer steps are the same on any number.
    """
    for progress in ("total", "current"):
        counts = fit_loop["epoch_loop.batch_progress"][progress]
        behind = {name: counts["ready"] - value for name, value in counts.items()}
        counts.update({name: batches - late for name, late in behind.items()})
