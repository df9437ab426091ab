"""transformers' assisted generation, in this very environment."""

import importlib.metadata
import sys
from pathlib import Path

from export.engine.base import Engine


class Transformers(Engine):
    """`generate(assistant_model=...)`; it is a library, so nothing is installed."""

    name = "transformers"
    title = "transformers assisted generation"
    version = importlib.metadata.version("transformers")
    steps = ()
    gigabytes = 0.0
    minutes = 0.0
    driver = "transformers_driver"
    dtypes = ("float32", "bfloat16", "float16")

    @property
    def python(self) -> Path:
        return Path(sys.executable)

    def is_installed(self) -> bool:
        return True
