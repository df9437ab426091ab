"""The output folder of a stream. It is a run folder: `python -m decode run=<folder>` measures it.

.hydra/config.yaml, rank_accuracy.json   of the run it started from
run.json            facts of that run, and under "online" the summary of the stream
online.yaml         the config of the stream
online.json         summary, every prompt, every update and its decision
online.png          acceptance and tokens per step over the stream
drafter/            the drafter that was served last
state.pt            weights, optimizer, buffers, position: what `resume` reads
"""

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from conf.console import say
from models.run import Run
from train.online.report import as_rows, plot, summary
from train.online.stream import Stream
from train.record import git_revision, write_atomic, write_config, write_json

STATE = "state.pt"
CONFIG = "online.yaml"


def begin(wanted: Path, cfg: DictConfig, run: Run) -> Path:
    """A new folder (-2, -3, ... when the name is taken) with what opens it as a run."""
    out, number = wanted, 1
    while out.exists():
        number += 1
        out = wanted.with_name(f"{wanted.name}-{number}")
    write_config(out, run.config)
    accuracy = run.path / "rank_accuracy.json"
    if accuracy.is_file():
        shutil.copy(accuracy, out / accuracy.name)
    cfg.run = str(run.path)  # `latest` may name another run by the time this stream is resumed
    # Written last: where it is, the folder can be resumed.
    write_atomic(out / CONFIG, OmegaConf.to_yaml(cfg))
    return out


def read_config(out: Path) -> DictConfig:
    """The config a stream was started with. Raises ValueError when there is no stream."""
    if not (out / CONFIG).is_file():
        raise ValueError(
            f"resume='{out}' is not the output folder of a stream: {out / CONFIG} is missing. Give "
            "the folder that `python -m scripts.online` named when it started."
        )
    cfg = OmegaConf.load(out / CONFIG)
    assert isinstance(cfg, DictConfig)
    return cfg


def save(stream: Stream, out: Path) -> None:
    """The state, then the numbers so far."""
    temporary = out / f"{STATE}.tmp"
    torch.save(stream.state_dict(), temporary)
    temporary.replace(out / STATE)
    content = {
        "command": ["python", "-m", "scripts.online", *sys.argv[1:]],
        "revision": git_revision(),
        "summary": summary(stream.records, stream.events),
    }
    write_json(out / "online.json", content | as_rows(stream.records, stream.events))


def load(stream: Stream, out: Path) -> None:
    """The last boundary that was saved; the beginning of the stream when there is none."""
    if not (out / STATE).is_file():
        return
    try:
        state = torch.load(out / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{out / STATE} cannot be read ({error}), so this stream cannot go on; start it again "
            "in a new folder."
        ) from error
    stream.load_state_dict(state)
    say(f"Going on after prompt {len(stream.records)} of {len(stream.asked)}.")


def finish(out: Path, stream: Stream, run: Run, *, caption: str) -> dict[str, Any]:
    """The drafter that was served last, the picture, the facts. Returns the summary."""
    drafter = stream.learner.served_drafter()
    fresh = out / "drafter.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    drafter.save_pretrained(fresh)
    shutil.rmtree(out / "drafter", ignore_errors=True)
    fresh.rename(out / "drafter")
    found = summary(stream.records, stream.events)
    whole = found["parts"]["all"]
    title = f"{whole['online']['value']:.2f} tokens per step while learning"
    if "frozen" in whole:
        title += f", {whole['frozen']['value']:.2f} frozen"
    plot(stream.records, stream.events, out / "online.png", title=title, caption=caption)
    write_json(out / "run.json", run.facts | {"online": {"from": str(run.path), **found}})
    return found
