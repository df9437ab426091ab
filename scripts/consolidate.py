"""A checkpoint of a run that is not finished, as a drafter folder that everything else loads.

python -m scripts.consolidate run=runs/eagle3/<id>                     the newest whole checkpoint
python -m scripts.consolidate run=... checkpoint=checkpoints/step-00000500.ckpt

Whichever strategy trained it and on however many processes: checkpoints are whole files. A run
that comes to its end does this by itself. An acceptance head comes with it, not calibrated yet.
"""

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

import conf.resolvers  # noqa: F401
from conf.check import build, friendly_errors
from conf.console import say
from data_prep.folder import DatasetFolder
from models.drafter.load import load_drafter
from models.target import Target
from train.acceptance import Acceptance
from train.finish import load_weights, save_drafter, weights_of
from train.resume import UNREADABLE, find_checkpoint, read_config, read_step, start_folder
from train.run import calibration_texts, make_drafter


def consolidate(run: Path, checkpoint: str | None, out: str | None) -> Path:
    """Write the drafter of a checkpoint; returns its folder."""
    settings = read_config(run)
    path = find_checkpoint(run).path if checkpoint is None else run / checkpoint
    if path is None:
        raise ValueError(
            f"There is no checkpoint that can be read in {run / 'checkpoints'}, expected at least "
            "one, because a run writes its first one at a validation; train it further: "
            f"python -m train resume={run}."
        )
    try:
        step = read_step(path)
    except UNREADABLE as error:
        raise ValueError(
            f"The checkpoint {path} is not whole ({error}); leave checkpoint out to take the "
            "newest one that is."
        ) from error
    folder = run / f"consolidated-{step:08d}" if out is None else Path(out)
    if folder.exists():
        raise ValueError(f"{folder} is there already and is not written over; give another out=.")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    target: Target = build(settings.target)
    plan: Acceptance | None = build(settings.get("acceptance"))
    if plan is not None:
        drafter = load_drafter(start_folder(settings.start), target)
        drafter.set_acceptance(plan.head(drafter))
    else:
        drafter = make_drafter(settings.drafter, target)
        if drafter.draft_ids_D is not None:
            drafter.set_vocab(weights_of(content, "drafter")["draft_ids_D"])
        data = DatasetFolder(Path(settings.dataset.root).expanduser() / settings.dataset.name)
        # Some families get parts (adapters) here; all weights are then the checkpoint's.
        drafter.bind(target).init_from(target, calibration_texts(data.reader("train")))
    load_weights(drafter, content)
    save_drafter(drafter, folder)
    say(f"The drafter after step {step} of {run} is in {folder}.")
    return folder


@hydra.main(version_base=None, config_path="pkg://conf", config_name="consolidate")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    with friendly_errors():
        consolidate(Path(cfg.run), cfg.checkpoint, cfg.out)


if __name__ == "__main__":
    main()
