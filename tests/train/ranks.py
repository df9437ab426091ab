"""`python -m train` where DeepSpeed runs on CPUs, which Lightning's strategy refuses: tests only.

    python -m tests.train.ranks trainer=deepspeed_2 trainer.devices=2 ...
    torchrun --nproc-per-node 2 -m tests.train.ranks plan.json

A plan is a list of runs, one after the other in the same processes: {"run_dir", "overrides"}, and
"stop": the step in which the last process gets a SIGTERM.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import deepspeed as lightning_deepspeed

from train.__main__ import main
from train.module import DraftModule
from train.preemption import Preempted
from train.run import train
from train.strategy.deepspeed import DeepSpeed

setattr(lightning_deepspeed, "_validate_device_index_selection", lambda parallel_devices: None)  # noqa: B010


class OnCpu:
    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # type: ignore[arg-type]

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # type: ignore[attr-defined]


for name in ("setup_environment", "root_device"):
    setattr(DeepSpeed, name, vars(OnCpu)[name])


def run_plan(plan: list[dict[str, Any]]) -> None:
    stop: int | None = None

    def kill_one(self: DraftModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = self.trainer.global_rank == self.trainer.world_size - 1
        if last and batch.ends_step and self.trainer.global_step == (stop or 0) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    DraftModule.on_train_batch_end = kill_one  # type: ignore[method-assign]
    for entry in plan:
        stop = entry.get("stop")
        with initialize_config_module(config_module="conf", version_base=None):
            cfg = compose("train", overrides=entry["overrides"])
        placed = cfg.resume is not None
        if stop is None:
            train(cfg, Path(entry["run_dir"]), placed=placed)
            continue
        with pytest.raises(Preempted) as stopped:
            train(cfg, Path(entry["run_dir"]), placed=placed)
        assert stopped.value.step == stop
        assert stopped.value.exit_code == 128 + signal.SIGTERM


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        run_plan(json.loads(Path(sys.argv[1]).read_text()))
    else:
        main()
