"""What a run folder says about itself: composed config, command, revision, versions, data, target.

Nothing of the environment is written: variables may hold secrets.
"""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from models.drafter.base import Drafter
from models.target import Target

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "safetensors", "numpy")


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    """`.hydra/config.yaml`, interpolations kept."""
    write_atomic(run_dir / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))


def facts(
    *, target: Target, drafter: Drafter, dataset_hash: str, coverage: float
) -> dict[str, Any]:
    """The content of run.json that is known before training."""
    return {
        "command": ["python", "-m", "train", *sys.argv[1:]],
        "revision": git_revision(),
        "versions": {
            "python": platform.python_version(),
            "draftsmith": version_of("draftsmith"),
            **{name: version_of(name) for name in PACKAGES},
        },
        "dataset": {"hash": dataset_hash},
        "target": {
            "name": target.name,
            "revision": target.revision,
            "fingerprint": target.fingerprint(),
            "template_hash": target.template_hash(),
        },
        "drafter": {
            "class": type(drafter).__name__,
            "depths": drafter.num_depths,
            "parameters": sum(p.numel() for p in drafter.parameters()),
            "trained": sum(p.numel() for p in drafter.parameters() if p.requires_grad),
            "draft_vocab_size": drafter.draft_vocab_size,
            "coverage": coverage,
        },
    }


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has had on its device so far (on a CPU: all that it had)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def version_of(package: str) -> str:
    """Installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_revision() -> str | None:
    """Commit of the source tree, with "+changes" when files differ from it; None outside of git."""
    root = Path(__file__).parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_json(path: Path, content: Any) -> None:
    """As JSON, atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """A reader meets the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def to_disk(path: Path) -> None:
    """When this returns a power failure cannot take the file (or the names in the folder) away."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(path: Path, name: Path) -> None:
    """A second name for a file, in place of what had it."""
    spare = name.with_suffix(".spare")
    spare.unlink(missing_ok=True)
    spare.hardlink_to(path)
    spare.replace(name)


def point_latest(run_dir: Path) -> None:
    """`latest` beside the run becomes a link to it."""
    link = run_dir.parent / "latest"
    fresh = run_dir.parent / f".latest-{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run_dir.name, target_is_directory=True)
    fresh.replace(link)
