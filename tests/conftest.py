"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, also in what tests start. Before torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

from models.target import Target
from tests.tiny import tiny_target


@pytest.fixture(scope="session")
def target() -> Target:
    """A tiny random target in fp32."""
    return tiny_target()


@pytest.fixture(scope="session")
def target_dir(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same target as a folder, for commands that load by name."""
    folder = tmp_path_factory.mktemp("tiny-target")
    target.model.save_pretrained(folder)  # type: ignore[operator]
    target.tokenizer.save_pretrained(folder)
    return folder
