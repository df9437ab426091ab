"""SGLang: EAGLE-3, EAGLE-1 (with HASS) and a draft model of its own ("STANDALONE").

EAGLE-3 is the folder that vLLM takes too (export/formats/eagle3.py); EAGLE-1 is written with the
architecture and the bias that SGLang's class has (export/formats/eagle.py).
"""

from export.formats.base import Format, FormatExporter
from export.formats.eagle import SglangEagle
from export.formats.eagle3 import Eagle3Format
from export.formats.language_model import LanguageModel
from models.drafter.base import Drafter
from models.drafter.eagle3 import Eagle3

ALGORITHMS = {"eagle3": "EAGLE3", "eagle (SGLang)": "EAGLE", "assistant": "STANDALONE"}


class SglangExporter(FormatExporter):
    """Drafters for SGLang."""

    name = "sglang"
    engine = "SGLang"
    forms = (Eagle3Format(), SglangEagle(), LanguageModel())
    cannot = "it has EAGLE-3, EAGLE with the target's head, and draft models"

    def refuse(self, drafter: Drafter) -> None:
        super().refuse(drafter)
        if isinstance(drafter, Eagle3) and drafter.norm_before_residual:
            raise ValueError(
                "SGLang's EAGLE-3 takes the un-normed feature as the residual, and this drafter "
                "was trained with drafter.norm_before_residual=true; train without it."
            )

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        return f"""SGLang, one draft chain of {drafts} tokens:

```bash
python -m sglang.launch_server --model-path {target} \\
  --speculative-algorithm {ALGORITHMS[form.name]} \\
  --speculative-draft-model-path path/to/this/folder \\
  --speculative-num-steps {drafts} --speculative-eagle-topk 1 \\
  --speculative-num-draft-tokens {drafts + 1}
```

`--speculative-eagle-topk` above 1 makes it a dynamic tree."""
