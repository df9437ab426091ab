"""Train a drafter.

python -m train +experiment=hydra_heads       a published recipe
python -m train resume=runs/hydra_heads/<id>  continue an interrupted run in its folder
python -m train resume=<run> trainer=ddp trainer.devices=2   the same, on other processes
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf.check import friendly_errors
from conf.console import is_first_process
from train.preemption import Preempted
from train.run import train


@hydra.main(version_base=None, config_path="pkg://conf", config_name="train")
def _command(cfg: DictConfig) -> None:
    hydra_cfg = HydraConfig.get()
    placed = any(o.startswith("trainer=") for o in hydra_cfg.overrides.task)
    try:
        with friendly_errors():
            train(cfg, Path(hydra_cfg.runtime.output_dir), placed=placed)
    except Preempted as stop:
        # Lightning ends the run when one of the processes that it started fails: these do not.
        sys.exit(stop.exit_code if is_first_process() else 0)


def main() -> None:
    """Entry point of `draft-train`."""
    _command()


if __name__ == "__main__":
    main()
