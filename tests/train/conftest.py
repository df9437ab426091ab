"""A dataset of the tiny target, and the command line that trains on it."""

import json
import random
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import conf.resolvers  # noqa: F401  (conf/train.yaml uses them)
from train.run import train as train_run

WORDS = ("the cat sat", "on the mat", "and a dog", "ran to", "what is two", "plus four", "please")


class Recipe:
    """Overrides that turn any experiment into a tiny offline one."""

    def __init__(self, folder: Path, target_dir: Path) -> None:
        prompts = folder / "prompts.jsonl"
        self.text = folder / "text.txt"
        self.text.write_text(
            "".join(f"the cat sat on mat {i} and the dog ran\n" for i in range(300))
        )
        rng = random.Random(0)
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(40)]
        prompts.write_text(
            "".join(json.dumps({"prompt": p, "completion": "-"}) + "\n" for p in lines)
        )
        self.overrides = [
            f"target.name={target_dir}",
            "target.dtype=float32",
            "target.device=cpu",
            "trainer.precision=float32",
            "dataset=tiny",
            f"dataset.sources=[{{_target_: data_prep.source.files.Files, path: {prompts}}}]",
            f"dataset.root={folder / 'data'}",
            "+dataset.capture={_target_: data_prep.stage.capture.Capture, dtype: float32}",
            "drafter.draft_vocab_size=64",
            "data.tokens_per_batch=256",
            "trainer.max_steps=2",
            "final_decode.limit=2",
            "final_decode.max_new_tokens=6",
        ]

    def compose(self, *overrides: str, without: str | None = None) -> DictConfig:
        """`without` leaves out our own overrides that begin like this."""
        ours = [o for o in self.overrides if without is None or not o.startswith(without)]
        with initialize_config_module(config_module="conf", version_base=None):
            return compose("train", overrides=[*ours, *overrides])

    def run(
        self, run_dir: Path, *overrides: str, without: str | None = None, placed: bool = False
    ) -> Path:
        """Train in this process."""
        cfg = self.compose(*overrides, without=without)
        OmegaConf.set_readonly(cfg, True)
        return train_run(cfg, run_dir, placed=placed)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, target_dir: Path) -> Recipe:
    return Recipe(tmp_path_factory.mktemp("train"), target_dir)
