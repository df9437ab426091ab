"""The original repositories of Medusa, Hydra, Kangaroo, EAGLE, EAGLE-3 and the MLP speculator.

Where their loaders know torch files only, one is written (plain tensors, which load with
weights_only); EAGLE's know safetensors.
"""

from export.formats.base import Format, FormatExporter
from export.formats.eagle import SglangEagle
from export.formats.eagle3 import Eagle3Format
from export.formats.hydra import HydraFormat
from export.formats.kangaroo import KangarooFormat
from export.formats.medusa_heads import OriginalMedusa
from export.formats.mlp_speculator import MlpSpeculatorFormat
from models.drafter.base import Drafter
from models.drafter.eagle3 import Eagle3

REPOSITORIES = {
    "medusa (original)": ("Medusa", "FasterDecoding/Medusa"),
    "hydra": ("Hydra", "zankner/Hydra"),
    "kangaroo": ("Kangaroo", "Equationliu/Kangaroo"),
    "eagle (SGLang)": ("EAGLE", "SafeAILab/EAGLE"),
    "mlp_speculator": ("the MLP speculator", "foundation-model-stack/fms-extras"),
    "eagle3": ("EAGLE-3", "SafeAILab/EAGLE"),
}


class OriginalExporter(FormatExporter):
    """Drafters for the code they were published with."""

    name = "original"
    engine = "Published code"
    forms = (
        OriginalMedusa(),
        HydraFormat(),
        KangarooFormat(),
        SglangEagle(),
        Eagle3Format(),
        MlpSpeculatorFormat(),
    )
    cannot = "there is a format for Medusa, Hydra, Kangaroo, EAGLE, EAGLE-3 and the MLP speculator"

    def refuse(self, drafter: Drafter) -> None:
        super().refuse(drafter)
        if not isinstance(drafter, Eagle3):
            return
        layers = drafter.target.num_layers
        fixed = [2, layers // 2, layers - 3]
        if sorted(drafter.feature_layers) != fixed:
            raise ValueError(
                f"The published code of EAGLE-3 reads the layers {fixed} of this target and no "
                f"others, and this drafter reads {list(drafter.feature_layers)}; train with "
                "drafter.feature_layers=null."
            )

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        method, repository = REPOSITORIES[form.name]
        text = f"""The folder is what the code of {method} (github.com/{repository}) loads as its
drafter for `{target}`."""
        if isinstance(form, KangarooFormat):
            text += (
                " The number of shallow layers is its argument `--early_stop_layer`; config.json "
                "says which. Its loader reads the target's head from `pytorch_model.bin` parts."
            )
        if isinstance(form, OriginalMedusa):
            text += " `base_model_name_or_path` in config.json must name the target for it."
        return text
