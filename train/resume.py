"""Which checkpoint an interrupted run continues from."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from conf.console import say
from train.callbacks import LAST, PREVIOUS


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that loads, and the number of steps finished in it (None, 0: from the start)."""

    path: Path | None
    step: int = 0


def read_config(run_dir: Path) -> DictConfig:
    """The config a run was started with. Raises ValueError when there is no run."""
    path = run_dir / ".hydra" / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"resume='{run_dir}' is not a run folder: {path} is missing. Give the folder that "
            "`python -m train` named when it started, such as runs/hydra_heads/<id>."
        )
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def find_checkpoint(run_dir: Path) -> ResumePoint:
    """last.ckpt if it loads, else previous.ckpt with a warning, else the start of the run."""
    for name in (LAST, PREVIOUS):
        path = run_dir / "checkpoints" / name
        if not path.is_file():
            continue
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return ResumePoint(path, int(content["global_step"]))
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            say(f"Warning: the checkpoint {path} cannot be read ({reason}); trying an older one.")
    return ResumePoint(None)
