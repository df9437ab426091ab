"""llama.cpp, as the xllamacpp wheel brings it: the server's own code."""

import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer

from export.engine.base import Dtype, Engine
from export.engine.contents import digest
from export.engine.environment import Pip
from export.formats.gguf import FILE
from export.formats.gguf_file import write_language_model
from export.formats.gguf_tokenizer import write_tokenizer
from export.tensors import load_tensors
from models.packaged import cache_dir


class Llamacpp(Engine):
    """Serves EAGLE-3 and draft models as one greedy chain a round.

    The target becomes a GGUF of the same weights, in the cache: what people serve is mostly
    quantised, and quantised weights are another target.
    """

    name = "llamacpp"
    title = "llama.cpp"
    version = "2026.10.11549"
    steps = (Pip(("xllamacpp==2026.10.11549",)),)
    gigabytes = 0.2
    minutes = 0.2
    driver = "llamacpp_driver"
    dtypes = ("float32", "bfloat16", "float16")

    def prepare(
        self, target: Path, draft: Path | None, scratch: Path, dtype: Dtype
    ) -> dict[str, Any]:
        file = None if draft is None else draft / FILE
        return {
            "target": str(target_gguf(target, dtype)),
            "draft": None if file is None else str(file),
            "options": {} if file is None else {"type": draft_type(file)},
        }


def draft_type(file: Path) -> str:
    """llama.cpp's `--spec-type` for a drafter."""
    architecture = GGUFReader(file).fields["general.architecture"].contents()
    return "draft-eagle3" if architecture == "eagle3" else "draft-simple"


def target_gguf(folder: Path, dtype: Dtype) -> Path:
    """The target in a plain folder as a GGUF with these very weights, made once for its contents.

    Raises ValueError for an architecture or tokenizer that is not written (export/formats).
    """
    out = cache_dir() / "targets" / f"gguf-{digest(folder)}-{dtype}.gguf"
    if out.is_file():
        return out
    config = AutoConfig.from_pretrained(folder).get_text_config()
    weights = load_tensors(folder)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = weights["model.embed_tokens.weight"].shape[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".writing-") as made:
        file = Path(made) / out.name
        write_language_model(
            file,
            config=config,
            weights=weights,
            dtype=dtype,
            tokenizer=lambda writer: write_tokenizer(writer, tokenizer, rows),
            about={"general.name": folder.name},
        )
        file.rename(out)
    return out
