"""A run folder, as decoding and export see it: composed config, target, drafter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.check import build
from models.drafter.base import Drafter
from models.drafter.load import load_drafter
from models.target import Target


@dataclass(frozen=True)
class Run:
    """A finished training run: `path`, its composed `config` and the `facts` of run.json."""

    path: Path
    config: DictConfig
    facts: dict[str, Any]

    @property
    def drafter_folder(self) -> Path:
        return self.path / "drafter"

    def load_target(self, dtype: str | None = None) -> Target:
        """The target this run was trained for; refuses one whose weights or template changed."""
        node = self.config.target.copy()
        if dtype is not None:
            node.dtype = dtype
        target: Target = build(node)
        trained = self.facts["target"]
        for what, then, now in (
            ("weights (fingerprint)", trained["fingerprint"], target.fingerprint()),
            ("chat template", trained["template_hash"], target.template_hash()),
        ):
            if then != now:
                raise ValueError(
                    f"The target '{target.name}' has other {what} ({now}) than when the drafter in "
                    f"'{self.path}' was trained ({then}); acceptance would drop silently. Load "
                    "that target again, or train a drafter for this one."
                )
        return target

    def load_drafter(self, target: Target) -> Drafter:
        """The trained drafter, bound to `target`, in the target's dtype and on its device."""
        return load_drafter(self.drafter_folder, target).to(target.dtype)

    def rank_accuracy(self) -> list[list[float]]:
        """`[K][R]`: share of validation positions whose label was the rank-r draft at depth k."""
        return json.loads((self.path / "rank_accuracy.json").read_text())["accuracy"]


def open_run(path: str | Path) -> Run:
    """Open a finished run folder. Raises ValueError when it is not one."""
    folder = Path(path)
    config_file, facts_file = folder / ".hydra" / "config.yaml", folder / "run.json"
    missing = [str(f) for f in (config_file, facts_file) if not f.is_file()]
    if missing or not (folder / "drafter").is_dir():
        raise ValueError(
            f"'{folder}' is not a finished run: {', '.join(missing) or 'drafter/'} is missing. "
            "Give a folder made by `python -m train`, for example runs/hydra_heads/latest; an "
            "interrupted run is finished with `python -m train resume=<folder>`."
        )
    config = OmegaConf.load(config_file)
    assert isinstance(config, DictConfig)
    return Run(folder.resolve(), config, json.loads(facts_file.read_text()))
