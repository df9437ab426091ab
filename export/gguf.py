"""llama.cpp: EAGLE-3 and draft models as GGUF files (export/formats/gguf.py)."""

import shlex
from pathlib import Path

from export.base import HERE, Precision
from export.formats.base import Format, FormatExporter
from export.formats.gguf import FILE, GgufEagle3Format, GgufLanguageModel, Quantization


class GgufExporter(FormatExporter):
    """Drafters for llama.cpp.

    `target_gguf` is the GGUF that serves the target; its tokenizer is copied. Null: the packaged
    target's own, or one written from the target's Hugging Face tokenizer. `quantization` makes the
    matrices of EAGLE-3 smaller than any float; our own drafter is given the same rounded numbers
    before the two are compared.
    """

    name = "gguf"
    engine = "llama.cpp"
    library = "gguf"
    served_by = ("llamacpp",)
    cannot = "it has EAGLE-3 and draft models"

    def __init__(
        self,
        *,
        gamma: int = 3,
        target_gguf: str | None = None,
        quantization: Quantization | None = None,
        dtype: Precision | None = None,
    ) -> None:
        super().__init__(gamma=gamma, dtype=dtype)
        if quantization is not None and dtype is not None:
            raise ValueError(
                f"exporter.dtype={dtype} and exporter.quantization={quantization} were given, "
                "expected one of them, because both say how matrices are stored; leave the other "
                "null."
            )
        if target_gguf is not None and not Path(target_gguf).is_file():
            raise ValueError(
                f"exporter.target_gguf='{target_gguf}' is no file, expected the GGUF that serves "
                "the target, because its tokenizer goes into the drafter; give its path, or null."
            )
        self.target_gguf = target_gguf
        self.forms = (
            GgufEagle3Format(target_gguf=target_gguf, quantization=quantization),
            GgufLanguageModel(target_gguf=target_gguf, quantization=quantization),
        )

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        served = self.target_gguf or "path/to/target.gguf"
        kind = form.name.upper().replace("-", "_")
        return f"""llama.cpp, one draft chain of {drafts} tokens; the target as GGUF with the same
vocabulary. With the wheel `xllamacpp`, which holds the server's own code; the timings of every
answer say how many drafts were accepted:

```bash
python - <<'END'
import signal
import xllamacpp as x

p = x.CommonParams()
p.model.path = "{served}"
p.speculative.types = [x.common_speculative_type.COMMON_SPECULATIVE_TYPE_{kind}]
p.speculative.draft.mparams.path = "{HERE}/{FILE}"
p.speculative.draft.n_max = {drafts}
p.port = 8080
server = x.Server(p)
signal.pause()
END
```

The same with llama.cpp's own program (a build has it, the wheel has not, so this line was never run
by Draftsmith's tests):

```bash
llama-server -m {shlex.quote(served)} -md {HERE}/{FILE} \\
  --spec-type {form.name} --spec-draft-n-max {drafts}
```"""
