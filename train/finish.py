"""What a run does once its last step is done: validate, keep the best drafter, measure its ranks.

A strategy has taken the drafter apart; here every process has a whole one, and validation shares
its batches among them without any strategy.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from conf.console import say
from models.drafter.base import Drafter
from models.drafter.load import load_drafter
from train.acceptance import AcceptanceModule, settle
from train.callbacks import BEST, Checkpoints
from train.data import TrainData
from train.metrics import drafted_ranks
from train.module import DraftModule
from train.record import to_disk, write_json


@dataclass(frozen=True)
class Job:
    """Everything a run is made of; `facts` is the content of run.json."""

    module: DraftModule
    data: TrainData
    trainer: pl.Trainer
    checkpoints: Checkpoints | None
    facts: dict[str, Any]


def finish(job: Job, run_dir: Path, resumed: Path | None) -> dict[str, Any]:
    """Validate the last drafter, keep the best one, and measure its ranks."""
    keeper, last = job.checkpoints, job.data.total_steps
    module = job.module
    drafter = _trained(module, resumed).to(module.teacher.target.device)
    if drafter is not module.drafter:
        module = module.remade(drafter)
        module.trainer = job.trainer
    module.end_with(drafter)
    if module.validated_step != last:
        validate(job.trainer, module, job.data)
    if keeper is not None and keeper.best_step not in (None, last):
        job.trainer.strategy.barrier()  # rank 0 may still be writing it
        best = load_drafter(keeper.folder / BEST, module.teacher.target)
        drafter.start_from(best)
        if best.acceptance is not None:
            assert drafter.acceptance is not None
            drafter.acceptance.load_state_dict(best.acceptance.state_dict())
        keeper.decided = True
        say(f"The drafter of step {keeper.best_step} had the best {keeper.monitor}: it is kept.")
        validate(job.trainer, module, job.data)
    if isinstance(module, AcceptanceModule) and job.trainer.is_global_zero:
        settle(module, job.data, run_dir)
    if job.trainer.is_global_zero:
        save_drafter(drafter, run_dir / "drafter")
        write_json(
            run_dir / "rank_accuracy.json",
            {
                "accuracy": drafted_ranks(module.tally, drafter),
                "positions": int(module.tally.count_K[0]),
            },
        )
    numbers = module.validation_numbers()
    return {"step": keeper.best_step if keeper else last, "val": numbers}


def save_drafter(drafter: Drafter, folder: Path) -> None:
    """As a drafter folder, in place of what was there."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    drafter.save_pretrained(fresh)
    for file in fresh.iterdir():
        to_disk(file)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _trained(module: DraftModule, resumed: Path | None) -> Drafter:
    """The drafter after its last step, whole."""
    if module.trained is not None:
        return module.trained
    # A run resumed behind its last step trains nothing: the weights are the checkpoint's.
    drafter = module.plain
    if drafter is module.drafter:
        return drafter
    assert resumed is not None
    load_weights(drafter, torch.load(resumed, map_location="cpu", weights_only=True))
    return drafter


def load_weights(drafter: Drafter, checkpoint: dict[str, Any]) -> None:
    """A checkpoint's weights, of the drafter and of its acceptance head if it has one."""
    drafter.load_state_dict(weights_of(checkpoint, "drafter"))
    if drafter.acceptance is not None:
        drafter.acceptance.load_state_dict(weights_of(checkpoint, "judge"))


def weights_of(checkpoint: dict[str, Any], part: str) -> dict[str, Any]:
    """The weights of a part of the trained module."""
    weights: dict[str, Any] = checkpoint["state_dict"]
    start = f"{part}."
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}


@torch.no_grad()
def validate(trainer: pl.Trainer, module: DraftModule, data: TrainData) -> None:
    """One pass over the validation batches, with the callbacks that Lightning would call."""
    device = module.teacher.target.device
    module.to(device).eval()
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        callback.on_validation_start(trainer, module)
    module.on_validation_epoch_start()
    for index, batch in enumerate(data.val_dataloader()):
        module.validation_step(batch.to(device), index)
    module.on_validation_epoch_end()
    for callback in callbacks:
        callback.on_validation_end(trainer, module)
