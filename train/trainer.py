"""The Trainer, from the few settings that are ours to choose."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from models.target import Target, has_fast_bf16
from train.data import TrainData

Precision = Literal["auto", "float32", "bfloat16"]


def pick_precision(precision: Precision, target: Target) -> Literal["32-true", "bf16-mixed"]:
    """`auto` is bf16 where the hardware multiplies it natively. Master weights are always fp32."""
    if precision == "auto":
        precision = "bfloat16" if has_fast_bf16(target.device) else "float32"
    return "bf16-mixed" if precision == "bfloat16" else "32-true"


def make_trainer(
    *,
    target: Target,
    data: TrainData,
    run_dir: Path,
    callbacks: list[Any],
    loggers: list[Any],
    epochs: int | None = 1,  # noqa: ARG001  (read by the plan of batches)
    max_steps: int | None = None,  # noqa: ARG001
    accumulate: int = 1,
    clip_norm: float | None = 1.0,
    precision: Precision = "auto",
    val_every_steps: int | None = None,
    log_every_steps: int = 1,
    devices: int = 1,
    strategy: str = "auto",
    deterministic: bool = False,
) -> pl.Trainer:
    """A Trainer that runs the plan of batches once: to Lightning the whole run is one epoch.

    `epochs` and `max_steps` bound the plan, so they do not appear here. `val_every_steps` null
    validates about once an epoch of the data.
    """
    every = val_every_steps or max(1, int(data.steps_per_epoch()))
    return pl.Trainer(
        default_root_dir=run_dir,
        accelerator="cpu" if target.device.type == "cpu" else "gpu",
        devices=devices,
        strategy=strategy,
        precision=pick_precision(precision, target),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip_norm,
        val_check_interval=min(every * accumulate, len(data.mine)),
        num_sanity_val_steps=0,
        log_every_n_steps=log_every_steps,
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        deterministic=deterministic,
    )
