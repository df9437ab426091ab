"""OpenVINO GenAI: EAGLE-3 and draft models as IR (export/formats/openvino.py)."""

import shlex

import torch

from export.base import HERE, Precision
from export.engine.openvino import WEIGHTS, Openvino
from export.formats.base import Format, FormatExporter
from export.formats.openvino import OpenvinoEagle3, OpenvinoLanguageModel
from models.drafter.base import Drafter


class OpenvinoExporter(FormatExporter):
    """Drafters for OpenVINO GenAI. An IR holds fp32 or fp16; a drafter trained in bf16 becomes fp16
    unless `dtype` says otherwise."""

    name = "openvino"
    engine = "OpenVINO GenAI"
    library = "openvino"
    served_by = ("openvino",)
    forms = (OpenvinoEagle3(), OpenvinoLanguageModel())
    cannot = "it has EAGLE-3 and draft models"

    def __init__(self, *, gamma: int = 3, dtype: Precision | None = None) -> None:
        super().__init__(gamma=gamma, dtype=dtype)
        if dtype is not None and dtype not in WEIGHTS:
            raise ValueError(
                f"exporter.dtype={dtype} was asked for, expected {' or '.join(WEIGHTS)}, because "
                "optimum-intel writes no other floats into an IR; give one of them, or null."
            )

    def cast(self, drafter: Drafter) -> Drafter:
        if self.dtype is None and drafter.dtype == torch.bfloat16:
            drafter = drafter.to(torch.float16)
        return super().cast(drafter)

    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        command = Openvino().serve(target="target-ir", draft=HERE, gamma=drafts)
        convert = (
            f"optimum-cli export openvino -m {shlex.quote(target)} "
            "--task text-generation-with-past target-ir"
        )
        return f"""OpenVINO GenAI, one draft chain of {drafts} tokens; the target as IR:

```bash
{convert}
{command}
```"""
