"""vLLM: EAGLE-3, EAGLE-1 (with HASS), a draft model, and Medusa up to 0.32.

What each folder looks like, and why, is in export/formats/: eagle3.py, eagle.py, medusa.py and
language_model.py. vLLM decodes chains of `num_speculative_tokens` drafts.
"""

import json

from export.formats.base import Format, FormatExporter
from export.formats.eagle import VllmEagle
from export.formats.eagle3 import Eagle3Format
from export.formats.language_model import LanguageModel
from export.formats.medusa import MedusaFormat

METHODS = {"eagle3": "eagle3", "eagle": "eagle", "medusa": "medusa", "assistant": "draft_model"}
"""What vLLM calls the method of each format."""
FORCING = ("eagle-", "eagle3", "dflash", "dspark")
"""Words anywhere in the folder's path by which vLLM picks the method itself."""


class VllmExporter(FormatExporter):
    """Drafters for vLLM."""

    name = "vllm"
    engine = "vLLM"
    served_by = ("vllm",)
    forms = (Eagle3Format(), VllmEagle(), MedusaFormat(), LanguageModel())
    cannot = (
        "it has EAGLE-3, EAGLE with the target's head, Medusa (0.32 and older), whose heads read "
        "the target's state and nothing else, and draft models"
    )

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        method = METHODS[form.name]
        config = {"method": method, "model": "path/to/this/folder"}
        asked = json.dumps({**config, "num_speculative_tokens": drafts})
        words = ", ".join(f"`{w}`" for w in FORCING if w != method)
        version = "vLLM 0.32 or older (0.33 removed the method)" if method == "medusa" else "vLLM"
        more = ""
        if method == "medusa":
            more = (
                " The heads hold their vocabulary rows in the file, as the format asks, also where "
                "those are the target's own."
            )
        if method == "eagle3":
            more = (
                "\n\nThe same folder serves SGLang (`--speculative-algorithm EAGLE3`), is what "
                "llama.cpp's `convert_hf_to_gguf.py --target-model-dir` and OpenVINO's "
                "`optimum-cli export openvino --trust-remote-code` convert, and TensorRT-LLM's "
                "`Eagle3DecodingConfig` loads."
            )
        return f"""{version}, one draft chain of {drafts} tokens:

```bash
vllm serve {target} --speculative-config \\
  '{asked}'
```

Keep {words} out of the folder's whole path: vLLM takes them for the name of another method. On a
CPU use temperature 0 only, because vLLM's sampling of drafts is wrong there in 0.32.{more}"""
