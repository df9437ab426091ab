"""Which checkpoint an interrupted run continues from."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from conf.console import say
from train.callbacks import LAST, PREVIOUS
from train.strategy.place import Place, shared_step

PLACED = ("strategy", "devices", "nodes", "shard_target")
"""Settings of a trainer that say how a run is spread over processes."""
UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


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
    """The newest checkpoint that is whole, with a warning for each that is not; else the start."""
    for path in _candidates(run_dir / "checkpoints"):
        try:
            return ResumePoint(path, read_step(path))
        except UNREADABLE as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            say(f"Warning: the checkpoint {path} cannot be read ({reason}); trying an older one.")
    return ResumePoint(None)


def read_step(path: Path) -> int:
    """Steps finished in a checkpoint, after comparing all of its content with its checksums."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of '{damaged}' in it is wrong")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(content["global_step"])


def _candidates(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file())
    yield from sorted(folder.glob("step-*.ckpt"), reverse=True)


# --- the config of a run that goes on ------------------------------------------------------------


def resumed_config(run_dir: Path, trainer: DictConfig | None) -> DictConfig:
    """The config a run was started with; how it is spread over processes is `trainer`'s, if given.

    A drafter's weights and the batches of its steps are the same on any number of processes.
    """
    cfg = read_config(run_dir)
    if trainer is None:
        return cfg
    places = {key: trainer.get(key) for key in PLACED if key in trainer}
    for key in places:
        cfg.trainer.pop(key, None)  # as a whole: a strategy's keys are its own
    return _merged(cfg, {"trainer": places})


def with_fixed_start(cfg: DictConfig) -> DictConfig:
    """`start` as the folder it names now: `latest` may be another run by the time this resumes."""
    if cfg.start is None:
        return cfg
    return _merged(cfg, {"start": str(start_folder(cfg.start).resolve())})


def start_folder(start: str) -> Path:
    """The drafter folder that `start` names: a run (its `drafter`), or a drafter itself."""
    for folder in (Path(start) / "drafter", Path(start)):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"start={start} should be a run folder or a drafter folder, but there is neither a "
        "config.json nor a drafter/config.json in it; give runs/<name>/latest of a finished run."
    )


def with_accumulation(cfg: DictConfig, run_dir: Path, place: Place) -> DictConfig:
    """The micro-batches each process makes of a step: all of them together are what they were."""
    accumulate = cfg.trainer.get("accumulate", 1)
    facts = run_dir / "run.json"
    if facts.is_file():
        together = json.loads(facts.read_text()).get("micro_batches", accumulate)
        accumulate = shared_step(micro_batches=together, world=place.world)
    return _merged(cfg, {"trainer": {"accumulate": accumulate}})


def is_finished(run_dir: Path) -> bool:
    """Whether the run in a folder came to its end."""
    facts = run_dir / "run.json"
    return facts.is_file() and bool(json.loads(facts.read_text()).get("finished"))


def require_same_config(run_dir: Path, cfg: DictConfig) -> None:
    """Refuse to continue a run with other settings, or to write over it."""
    then = OmegaConf.to_container(read_config(run_dir))
    now = OmegaConf.to_container(cfg)
    assert isinstance(then, dict)
    assert isinstance(now, dict)
    keys = [str(k) for k in then | now if then.get(k) != now.get(k)]
    if keys:
        raise ValueError(
            f"{run_dir} holds a run with other settings ({', '.join(sorted(keys))} differ), and it "
            "would be written over; continue it with resume=<folder>, or give another folder "
            "(hydra.run.dir=...) or name."
        )


def _merged(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    merged = OmegaConf.merge(cfg, changes)
    assert isinstance(merged, DictConfig)
    return merged
