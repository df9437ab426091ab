"""TGI: Medusa heads as `medusa_lm_head.safetensors`; config.json names the target."""

from export.formats.base import Format, FormatExporter
from export.formats.medusa_heads import TgiMedusa


class TgiExporter(FormatExporter):
    """Drafters for Text Generation Inference."""

    name = "tgi"
    engine = "TGI"
    forms = (TgiMedusa(),)
    cannot = "it has Medusa and MLP speculators"

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        return f"""TGI serves the target through this folder, whose `base_model_name_or_path` must
name the target as TGI can load it ({target}):

```bash
text-generation-launcher --model-id path/to/this/folder --speculate {drafts}
```"""
