"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, also in what tests start. Before torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

from models.target import Target
from tests.tiny import tiny_target


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engines",
        choices=("with", "without", "only"),
        default="with",
        help="tests of real engines: beside the others, not at all, or alone",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Engines take all cores and some GB each, so they do not run beside several processes."""
    wanted = config.getoption("--engines")
    if wanted == "with":
        return
    kept, left = [], []
    for item in items:
        is_engine = item.get_closest_marker("engine") is not None
        (kept if is_engine == (wanted == "only") else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


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
