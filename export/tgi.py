"""TGI: Medusa heads and MLP speculators; config.json names the target."""

from export.formats.base import Format, FormatExporter
from export.formats.medusa_heads import TgiMedusa
from export.formats.mlp_speculator import MlpSpeculatorFormat
from models.drafter.base import Drafter
from models.drafter.mlp_speculator import MlpSpeculator


class TgiExporter(FormatExporter):
    """Drafters for Text Generation Inference."""

    name = "tgi"
    engine = "TGI"
    forms = (TgiMedusa(), MlpSpeculatorFormat())
    cannot = "it has Medusa and MLP speculators"

    def refuse(self, drafter: Drafter) -> None:
        super().refuse(drafter)
        if isinstance(drafter, MlpSpeculator) and drafter.scale_input:
            raise ValueError(
                "TGI's MLP speculator reads the hidden state as it is, and this drafter was "
                "trained with drafter.scale_input=true; train with false."
            )

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        return f"""TGI serves the target through this folder, whose `base_model_name_or_path` must
name the target as TGI can load it ({target}):

```bash
text-generation-launcher --model-id path/to/this/folder --speculate {drafts}
```"""
