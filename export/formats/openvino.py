"""Drafters as OpenVINO IR: EAGLE-3, or a small language model, through optimum-intel.

The plain folder that other engines take (export/formats/eagle3.py, language_model.py) is written
and converted in OpenVINO's own environment. For EAGLE-3 two things are added: the target's
embedding, which the converter's class has a place for (OpenVINO GenAI shares the target's at run
time), and `hidden_layers_list` in the IR, without which OpenVINO reads layers one too late. The
proof runs the IR with OpenVINO (export/formats/openvino_reader.py).
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from export.base import Reader
from export.engine.openvino import WEIGHTS, Openvino
from export.formats import openvino_check
from export.formats.base import Format
from export.formats.eagle3 import IDS, Eagle3Format
from export.formats.language_model import LanguageModel
from export.formats.openvino_reader import OpenvinoReader
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.eagle3 import Eagle3
from models.drafter.sorted_lm import SortedLm
from models.target import Target


class OpenvinoFormat(Format):
    """Base of the two."""

    plain: Format
    """The folder that is converted."""

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        weights = WEIGHTS[str(drafter.dtype).removeprefix("torch.")]
        with tempfile.TemporaryDirectory(prefix="draftsmith-") as made:
            source, out = Path(made) / "plain", Path(made) / "ir"
            source.mkdir()
            self.plain.write(drafter, source, texts)
            layers = self.finish(source, drafter)
            Openvino().convert(source, out, weights=weights, layers=layers)
            for file in out.iterdir():
                shutil.move(file, folder / file.name)

    def finish(self, source: Path, drafter: Drafter) -> list[int] | None:
        """What the converter needs beside the plain folder; EAGLE-3's layers."""
        return None

    def read(self, folder: Path, target: Target) -> Reader:
        layers = json.loads((folder / "config.json").read_text()).get(IDS)
        return OpenvinoReader(folder, layers)

    def is_mine(self, folder: Path) -> bool:
        return openvino_check.is_mine(folder)

    def problems(self, folder: Path) -> list[str]:
        return openvino_check.problems(folder)


class OpenvinoEagle3(OpenvinoFormat):
    """EAGLE-3."""

    name = "openvino-eagle3"
    families = (Eagle3,)
    plain = Eagle3Format()

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, Eagle3)
        for setting in ("norm_output", "norm_before_residual"):
            if getattr(drafter, setting):
                return (
                    f"This drafter has drafter.{setting}=true, which optimum-intel's EAGLE-3 has "
                    "not; train with false."
                )
        return self.plain.complaint(drafter)

    def finish(self, source: Path, drafter: Drafter) -> list[int] | None:
        file = source / "model.safetensors"
        embedding_Vd = drafter.target.embedding_weight_Vd.detach().to("cpu", drafter.dtype)
        tensors = {**load_file(file), "embed_tokens.weight": embedding_Vd.clone()}
        save_file(tensors, str(file), metadata={"format": "pt"})
        return json.loads((source / "config.json").read_text())[IDS]


class OpenvinoLanguageModel(OpenvinoFormat):
    """A small language model."""

    name = "openvino-draft"
    families = (CausalLm, SortedLm)
    plain = LanguageModel()

    def complaint(self, drafter: Drafter) -> str | None:
        return self.plain.complaint(drafter)
