"""The Trainer, from the few settings that are ours to choose."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import Strategy

from models.device import has_fast_bf16
from models.target import Target
from train.data import TrainData
from train.strategy.deepspeed import DeepSpeed, Fp32Weights
from train.strategy.place import Count, Place

Precision = Literal["auto", "float32", "bfloat16"]


def pick_precision(precision: Precision, device: torch.device) -> Literal["32-true", "bf16-mixed"]:
    """`auto` is bf16 where the hardware multiplies it natively. Master weights are always fp32."""
    if precision == "auto":
        precision = "bfloat16" if has_fast_bf16(device) else "float32"
    return "bf16-mixed" if precision == "bfloat16" else "32-true"


def make_trainer(
    *,
    target: Target,
    data: TrainData,
    run_dir: Path,
    callbacks: list[Any],
    loggers: list[Any],
    place: Place | None = None,
    device: torch.device | None = None,
    epochs: int | None = 1,  # noqa: ARG001  (read by the plan of batches)
    max_steps: int | None = None,  # noqa: ARG001
    accumulate: int = 1,
    clip_norm: float | None = 1.0,
    precision: Precision = "auto",
    recompute: bool = False,  # noqa: ARG001  (read by the module)
    val_every_steps: int | None = None,
    log_every_steps: int = 1,
    devices: Count = 1,  # noqa: ARG001  (`place` says how many they are)
    nodes: Count = 1,  # noqa: ARG001
    shard_target: bool = False,  # noqa: ARG001  (read by the module)
    strategy: Strategy | Literal["auto"] = "auto",
    deterministic: bool = False,
) -> pl.Trainer:
    """A Trainer that runs the plan of batches once: to Lightning the whole run is one epoch.

    `epochs` and `max_steps` bound the plan, so they do not appear here. `val_every_steps` null
    validates about once an epoch of the data. `device` is where this process trains (null: where
    the target is).
    """
    place, device = place or Place(), device or target.device
    if strategy == "auto" and place.world > 1:
        raise ValueError(
            f"trainer.strategy=auto trains in one process, but trainer.devices and trainer.nodes "
            f"make {place.world}; choose how they share the work: trainer=ddp, fsdp2, deepspeed_1, "
            "deepspeed_2 or deepspeed_3."
        )
    every = val_every_steps or max(1, int(data.steps_per_epoch()))
    chosen = pick_precision(precision, device)
    plugins: list[Any] = []
    if isinstance(strategy, DeepSpeed):
        if len(data.plan) % (accumulate * place.world):
            raise ValueError(
                f"{len(data.plan)} micro-batches do not make whole steps of "
                f"{accumulate * place.world}, and DeepSpeed never ends a step early; give "
                "trainer.max_steps or more data."
            )
        dtype = torch.bfloat16 if chosen == "bf16-mixed" else None
        plugins.append(Fp32Weights(dtype=dtype, device_type=device.type))
    if SLURMEnvironment.detect():
        # Preemption is ours (train/preemption.py): Lightning would save in the middle of a step.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return pl.Trainer(
        default_root_dir=run_dir,
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=place.devices,
        num_nodes=place.nodes,
        strategy=strategy,
        plugins=plugins or None,
        precision=None if isinstance(strategy, DeepSpeed) else chosen,
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
