"""The engines that run here, by name."""

from export.engine.base import Engine
from export.engine.environment import Environment
from export.engine.llamacpp import Llamacpp
from export.engine.openvino import Openvino
from export.engine.speculators import Speculators
from export.engine.transformers import Transformers
from export.engine.vllm import Vllm

ENGINES: tuple[type[Engine], ...] = (Transformers, Vllm, Llamacpp, Openvino)
LIBRARIES: tuple[type[Environment], ...] = (Speculators,)
"""Not engines, but installed in the same way."""


def load_engine(name: str) -> Engine:
    """The engine with this name; ValueError when there is none."""
    for engine in ENGINES:
        if engine.name == name:
            return engine()
    known = ", ".join(engine.name for engine in ENGINES)
    raise ValueError(
        f"engine={name} was asked for, but the engines that run here are {known}; give one of them."
    )


def load_environment(name: str) -> Environment:
    """The engine or library with this name; ValueError when there is none."""
    known = (*ENGINES, *LIBRARIES)
    for environment in known:
        if environment.name == name:
            return environment()
    raise ValueError(
        f"install={name} was asked for, expected one of {', '.join(e.name for e in known)}; give "
        "one of them."
    )
