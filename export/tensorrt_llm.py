"""TensorRT-LLM: EAGLE-3, a draft model, and Medusa on its legacy path. Its folders are files that
others read too (export/formats/); nothing of it runs here.

Its ids of EAGLE-3's layers are an argument: the index of the layer whose output is read, one less
than the layers before the feature."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from export.formats.base import Format, FormatExporter
from export.formats.eagle3 import Eagle3Format
from export.formats.language_model import LanguageModel
from export.formats.medusa_heads import OriginalMedusa
from models.drafter.base import Drafter


class TensorrtLlmExporter(FormatExporter):
    """Drafters for TensorRT-LLM."""

    name = "tensorrt_llm"
    engine = "TensorRT-LLM"
    forms = (Eagle3Format(), OriginalMedusa(), LanguageModel())
    cannot = "it has EAGLE-3, Medusa and draft models"

    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        super().write(drafter, folder, texts=texts)
        self.outputs = {k - 1 for k in drafter.feature_layers}

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        if isinstance(form, Eagle3Format):
            made = (
                f'Eagle3DecodingConfig(max_draft_len={drafts}, speculative_model="path/to/this/'
                f'folder", eagle3_layers_to_capture={self.outputs})'
            )
        elif isinstance(form, OriginalMedusa):
            made = (
                f"MedusaDecodingConfig(num_medusa_heads={drafts}, medusa_choices=[[0]], "
                'speculative_model="path/to/this/folder")'
            )
        else:
            made = (
                f"DraftTargetDecodingConfig(max_draft_len={drafts}, "
                'speculative_model="path/to/this/folder")'
            )
        return f"""TensorRT-LLM:

```python
from tensorrt_llm import LLM
from tensorrt_llm.llmapi import {made.partition("(")[0]}

llm = LLM("{target}", speculative_config={made})
```"""
