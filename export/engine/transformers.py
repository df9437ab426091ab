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

    def serve(self, *, target: str, draft: str, gamma: int) -> str:
        return (
            'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"t, d = M.from_pretrained('{target}'), M.from_pretrained('{draft}'); "
            f"k = T.from_pretrained('{target}'); "
            "x = k('The capital of France is', return_tensors='pt'); "
            'print(k.decode(t.generate(**x, assistant_model=d, max_new_tokens=32)[0]))"'
        )
