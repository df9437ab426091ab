"""OpenVINO GenAI: EAGLE-3 and draft models as IR (export/formats/openvino.py)."""

import shlex

import torch

from export.base import HERE, Precision
from export.engine.openvino import WEIGHTS
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
        convert = (
            f"optimum-cli export openvino -m {shlex.quote(target)} "
            "--task text-generation-with-past target-ir"
        )
        return f"""OpenVINO GenAI, one draft chain of {drafts} tokens; the target as IR:

```bash
{convert}
python - <<'END'
import openvino_genai as g

config = g.GenerationConfig()
config.max_new_tokens, config.do_sample, config.num_assistant_tokens = 64, False, {drafts}
drafter = g.draft_model("{HERE}", "CPU")
pipe = g.LLMPipeline("target-ir", "CPU", draft_model=drafter)
answer = pipe.generate(["The capital of France is"], config)
print("accepted drafts:", answer.extended_perf_metrics.get_num_accepted_tokens())
print(answer.texts[0])
END
```"""
