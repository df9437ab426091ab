"""Load any drafter folder: config.json says which family it is."""

import importlib
import json
from pathlib import Path
from typing import Any

from models.acceptance import KEY, AcceptanceHead
from models.drafter.base import Drafter
from models.target import Target


def load_drafter(folder: str | Path, target: Target) -> Drafter:
    """Load the drafter saved in `folder` and bind it to `target`, in the target's device.

    Raises ValueError when the folder holds no drafter or was made for a target of another shape.
    """
    family, _ = drafter_class(folder)
    drafter = family.from_pretrained(str(folder))
    described = json.loads((Path(folder) / "config.json").read_text()).get(KEY)
    if described is not None:
        drafter.set_acceptance(AcceptanceHead.load(Path(folder), described))
    return drafter.to(target.device).bind(target).eval()


def drafter_class(folder: str | Path) -> tuple[type[Drafter], dict[str, Any]]:
    """The class that config.json names under `_target_`, and the arguments beside it (without the
    description of an acceptance head).

    Only `models.drafter` is accepted, because the folder may be a download.
    """
    path = Path(folder)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"There is no drafter in '{path}': expected config.json and model.safetensors there. "
            "Give the `drafter` folder of a finished run."
        )
    arguments = json.loads(config_file.read_text())
    arguments.pop(KEY, None)
    named = str(arguments.pop("_target_", ""))
    module, _, name = named.rpartition(".")
    if not module.startswith("models.drafter."):
        raise ValueError(
            f"'{config_file}' does not name one of our drafters (its _target_ is "
            f"'{named}', expected models.drafter.<family>.<Class>)."
        )
    return getattr(importlib.import_module(module), name), arguments
