"""llama.cpp: EAGLE-3 and draft models as GGUF files (export/formats/gguf.py)."""

from pathlib import Path

from export.base import HERE, Precision
from export.formats.base import Format, FormatExporter
from export.formats.gguf import FILE, GgufEagle3Format, GgufLanguageModel


class GgufExporter(FormatExporter):
    """Drafters for llama.cpp.

    `target_gguf` is the GGUF that serves the target; its tokenizer is copied. Null: the packaged
    target's own, or one written from the target's Hugging Face tokenizer.
    """

    name = "gguf"
    engine = "llama.cpp"
    library = "gguf"
    served_by = ("llamacpp",)
    cannot = "it has EAGLE-3 and draft models"

    def __init__(
        self, *, gamma: int = 3, target_gguf: str | None = None, dtype: Precision | None = None
    ) -> None:
        super().__init__(gamma=gamma, dtype=dtype)
        if target_gguf is not None and not Path(target_gguf).is_file():
            raise ValueError(
                f"exporter.target_gguf='{target_gguf}' is no file, expected the GGUF that serves "
                "the target, because its tokenizer goes into the drafter; give its path, or null."
            )
        given = {"target_gguf": target_gguf}
        self.forms = (GgufEagle3Format(**given), GgufLanguageModel(**given))

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        return f"""llama.cpp, one draft chain of {drafts} tokens; the target as GGUF with the same
vocabulary:

```bash
llama-server -m path/to/target.gguf -md {HERE}/{FILE} \\
  --spec-type {form.name} --spec-draft-n-max {drafts}
```"""
