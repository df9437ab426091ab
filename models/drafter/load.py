"""Load any drafter folder: config.json says which family it is."""

import importlib
import json
from pathlib import Path

from models.drafter.base import Drafter
from models.target import Target


def load_drafter(folder: str | Path, target: Target) -> Drafter:
    """Load the drafter saved in `folder` and bind it to `target`, in the target's device.

    `config.json` names the family's class under `_target_`; only `models.drafter` is accepted,
    because the folder may be a download. Raises ValueError when the folder holds no drafter or was
    made for a target of another shape.
    """
    path = Path(folder)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"There is no drafter in '{path}': expected config.json and model.safetensors there. "
            "Give the `drafter` folder of a finished run."
        )
    config = json.loads(config_file.read_text())
    module, _, name = str(config.get("_target_", "")).rpartition(".")
    if not module.startswith("models.drafter."):
        raise ValueError(
            f"'{config_file}' does not name one of our drafters (its _target_ is "
            f"'{config.get('_target_')}', expected models.drafter.<family>.<Class>)."
        )
    family: type[Drafter] = getattr(importlib.import_module(module), name)
    drafter = family.from_pretrained(str(path))
    return drafter.to(target.device).bind(target).eval()
