"""A finished run folder around a tiny drafter, for tests of the command."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data_prep.shards import Example, write_tokens
from models.drafter.base import Drafter
from models.target import Target


def write_run(
    folder: Path,
    *,
    drafter: Drafter,
    node: dict[str, Any],
    target: Target,
    target_dir: Path,
    prompt: int = 0,
) -> None:
    """Config, facts, drafter and three validation texts of 20 tokens, `prompt` of them not learned.

    `node` is the drafter's part of the config.
    """
    drafter.save_pretrained(folder / "drafter")
    data = folder.parent / "data" / "words"
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, target.vocab_size, (20,), generator=generator) for _ in range(3)]
    rows = [Example(f"x/{i}", t, torch.arange(20) >= prompt) for i, t in enumerate(tokens)]
    splits = {s: {"tokens": write_tokens(data / s, rows, 9), "features": []} for s in ("val",)}
    for entry in splits["val"]["tokens"]:
        assert (data / entry["file"]).is_file()
    (data / "manifest.json").write_text(json.dumps({"splits": splits}))
    config = {
        "target": {
            "_target_": "models.target.load_target",
            "name": str(target_dir),
            "dtype": "float32",
        },
        "drafter": node,
        "dataset": {"root": str(data.parent), "name": "words"},
    }
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
    facts = {
        "command": ["python", "-m", "train"],
        "revision": "abc123",
        "dataset": {"hash": "d41d8cd9"},
        "target": {
            "fingerprint": target.fingerprint(),
            "template_hash": target.template_hash(),
        },
    }
    (folder / "run.json").write_text(json.dumps(facts))
