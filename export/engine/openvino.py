"""OpenVINO GenAI, and optimum-intel that converts for it."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from export.engine.base import Dtype, Engine
from export.engine.contents import digest
from export.engine.environment import Pip
from export.engine.process import call_driver, driver_file
from models.packaged import cache_dir

WEIGHTS = {"float32": "fp32", "float16": "fp16"}
"""optimum-intel's names of the precisions that an IR holds."""


class Openvino(Engine):
    """Serves EAGLE-3 and draft models as one greedy chain a round.

    Its defaults (bf16 maths, a compressed cache) change texts with the number of tokens in a
    forward; in float32 it is told to keep everything in that.
    """

    name = "openvino"
    title = "OpenVINO GenAI"
    version = "2026.4.1"
    # optimum without its pins, which ask for torchvision.
    steps = (
        Pip(("torch==2.13.0",)),
        Pip(
            (
                "transformers==5.5.4",
                "openvino==2026.4.1",
                "openvino-genai==2026.4.1.0",
                "openvino-tokenizers==2026.4.1.0",
                "nncf==3.4.0",
                "huggingface-hub<1.22",
                "accelerate",
                "diffusers",
                "einops",
                "pillow",
            )
        ),
        Pip(("optimum==2.3.0", "optimum-intel==2.2.0"), deps=False),
    )
    gigabytes = 1.6
    minutes = 1.5
    driver = "openvino_driver"
    variables: ClassVar[dict[str, str]] = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def convert(
        self, source: Path, out: Path, *, weights: str, layers: Sequence[int] | None = None
    ) -> None:
        """A plain folder as an IR folder. `layers` are EAGLE-3's, counted as the layers before the
        feature; the IR is given the index of the layer whose output it is, one less."""
        self.install()
        outputs = None if layers is None else " ".join(str(k - 1) for k in layers)
        request = {"source": str(source), "out": str(out), "weights": weights, "layers": outputs}
        call_driver(
            self.python,
            driver_file("openvino_convert_driver"),
            request,
            environment=self.variables,
            timeout_s=self.timeout_s,
        )

    def prepare(
        self, target: Path, draft: Path | None, scratch: Path, dtype: Dtype
    ) -> dict[str, Any]:
        return {
            "target": str(self.target_ir(target)),
            "draft": None if draft is None else str(draft),
            "options": {},
        }

    def target_ir(self, folder: Path) -> Path:
        """The target in a plain folder as an IR with fp32 weights, made once for its contents."""
        out = cache_dir() / "targets" / f"openvino-{digest(folder)}"
        if out.is_dir():
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".converting-") as made:
            ir = Path(made) / "ir"
            self.convert(folder, ir, weights="fp32")
            ir.rename(out)
        return out
