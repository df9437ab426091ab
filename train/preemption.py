"""A run that has to make room: checkpoint at the end of the step, queue again, stop."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from conf.console import say
from train.callbacks import Checkpoints
from train.data import Batch

Cause = Literal["SIGUSR1", "SIGUSR2", "SIGTERM", "time limit"]
SIGNALS: tuple[Cause, ...] = ("SIGUSR1", "SIGUSR2", "SIGTERM")
CODES: tuple[Cause | None, ...] = (None, *SIGNALS, "time limit")


class Preempted(Exception):
    """Raised in every process of the run once its checkpoint is on disk."""

    def __init__(self, cause: Cause, step: int, *, queued: bool) -> None:
        super().__init__(f"{cause} after step {step}")
        self.cause, self.step, self.queued = cause, step, queued

    @property
    def exit_code(self) -> int:
        """0 when Slurm starts the job again; else as a process that the signal ended."""
        if self.queued:
            return 0
        number = signal.SIGUSR1 if self.cause == "time limit" else getattr(signal, self.cause)
        return 128 + int(number)


class Preemption(Callback):
    """Ends a run at a step when a signal comes, or `margin_seconds` before Slurm's time limit.

    Processes agree on it after every step, because signals do not reach them at the same moment.
    For the causes in `requeue` the Slurm job is queued again; started anew in the same run folder,
    the same command goes on with the next step. (SIGTERM is not among them: scancel sends it too,
    and Slurm queues a job again by itself when a partition's PreemptMode is REQUEUE.) SIGUSR2 is
    submitit's: its own handler, which queues again, runs once the checkpoint is there.
    """

    def __init__(
        self,
        *,
        margin_seconds: float = 60.0,
        requeue: list[Cause] | None = None,
    ) -> None:
        self.margin_seconds = margin_seconds
        self.requeue: list[Cause] = ["SIGUSR1", "time limit"] if requeue is None else requeue
        self._received: Cause | None = None
        self._after_validation: Cause | None = None
        self._before: dict[str, Any] = {}
        self._end: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # the others hear of it
            self._end = job_end()
        # After Lightning's own handlers, one of which talks to other processes from the handler.
        for name in SIGNALS:
            self._before[name] = signal.signal(getattr(signal, name), self._note)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name  # type: ignore[assignment]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if not batch.ends_step:
            return
        cause = self._agreed(trainer)
        # A run that goes on behind a validation would leave it out.
        if (batch_idx + 1) % int(trainer.val_check_batch or 1) == 0:
            self._after_validation = cause
        elif cause is not None:
            self._stop(trainer, cause)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cause, self._after_validation = self._after_validation, None
        if cause is not None:
            self._stop(trainer, cause)

    def _agreed(self, trainer: pl.Trainer) -> Cause | None:
        """The cause that any process has."""
        cause = self._received
        if (
            cause is None
            and self._end is not None
            and time.time() > self._end - self.margin_seconds
        ):
            cause = "time limit"
        if trainer.world_size == 1:
            return cause
        code = torch.tensor(float(CODES.index(cause)), device=trainer.strategy.root_device)
        return CODES[int(trainer.strategy.reduce(code, reduce_op="max"))]  # type: ignore[arg-type]

    def _stop(self, trainer: pl.Trainer, cause: Cause) -> None:
        step = trainer.global_step
        keeper = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
        if keeper is not None and keeper.saved_step != step:
            keeper.save(trainer)
        trainer.strategy.barrier()
        queued = False
        if trainer.is_global_zero:
            kept = "no checkpoint is configured" if keeper is None else "its checkpoint is written"
            say(f"Stopping after step {step} ({cause}): {kept}.")
        if cause == "SIGUSR2" and callable(self._before.get("SIGUSR2")):
            handler: Callable[[int, FrameType | None], Any] = self._before["SIGUSR2"]
            handler(signal.SIGUSR2, None)  # queues again and ends the process
        elif cause in self.requeue and "SLURM_JOB_ID" in os.environ:
            queued = True
            if trainer.is_global_zero:
                queue_again()
        raise Preempted(cause, step, queued=queued)


def job_end() -> float | None:
    """When Slurm will end the job this process belongs to (seconds since 1970), if it is in one.

    Before Slurm 23.02 a job's environment does not say it.
    """
    env = os.environ
    if env.get("SLURM_JOB_END_TIME"):
        return float(env["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" not in env:
        return None
    ask = ["squeue", "--noheader", "--jobs", env["SLURM_JOB_ID"], "--format=%e"]
    try:
        done = subprocess.run(
            ask, env=env | {"SLURM_TIME_FORMAT": "%s"}, capture_output=True, text=True, timeout=60
        )
        return float(done.stdout)  # "N/A" without a limit
    except (OSError, subprocess.TimeoutExpired, ValueError):
        job = env["SLURM_JOB_ID"]
        say(f"Slurm does not say when job {job} ends: the run does not stop before that by itself.")
        return None


def queue_again() -> None:
    """`scontrol requeue` of the job this process belongs to."""
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        say(f"Warning: Slurm job {job} could not be queued again ({done.stderr.strip()}).")
    else:
        say(f"Slurm job {job} is queued again.")
