"""The speculators library (0.9), whose folders vLLM serves directly: EAGLE-3.

The layout is in export/formats/speculators_eagle3.py.
"""

from export.base import Precision
from export.formats.base import Format, FormatExporter
from export.formats.speculators_eagle3 import SpeculatorsFormat


class SpeculatorsExporter(FormatExporter):
    """Drafters for `vllm serve <folder>`.

    `verifier` is the target as serving will load it, a Hub id or a folder, kept in the file. None
    is the name it was trained under.
    """

    name = "speculators"
    engine = "vLLM by speculators' format"
    forms: tuple[Format, ...] = ()
    served_by = ("vllm",)
    cannot = "the format has EAGLE-3 (of the families here)"

    def __init__(
        self, *, gamma: int = 3, verifier: str | None = None, dtype: Precision | None = None
    ) -> None:
        super().__init__(gamma=gamma, dtype=dtype)
        self.forms = (SpeculatorsFormat(gamma=gamma, verifier=verifier),)

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        return f"""vLLM takes the target, the method and {drafts} drafts a round from the folder:

```bash
vllm serve path/to/this/folder
```

Its `speculators_config.verifier.name_or_path` says where the target is ({target}). The speculators
library loads the folder too (`SpeculatorModel.from_pretrained`)."""
