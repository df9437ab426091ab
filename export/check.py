"""Validate an exported folder, whatever its format: `python -m export check=<folder>`."""

import json
from pathlib import Path
from typing import Any

from export import assistant, hf
from export.formats import dflash, gguf_check, openvino_check
from export.formats.eagle import SglangEagle, VllmEagle
from export.formats.eagle3 import Eagle3Format
from export.formats.hydra import HydraFormat
from export.formats.kangaroo import KangarooFormat
from export.formats.medusa import MedusaFormat
from export.formats.medusa_heads import OriginalMedusa, TgiMedusa
from export.formats.mlp_speculator import MlpSpeculatorFormat
from export.formats.speculators_eagle3 import SpeculatorsFormat

FORMATS = (
    hf,
    SpeculatorsFormat(),
    dflash,
    MedusaFormat(),
    MlpSpeculatorFormat(),
    TgiMedusa(),
    OriginalMedusa(),
    HydraFormat(),
    Eagle3Format(),
    VllmEagle(),
    SglangEagle(),
    KangarooFormat(),
    assistant,
)
"""Modules or formats with `is_mine` and `problems`; the first that a folder belongs to."""


def check_export(folder: Path) -> str:
    """The format of a folder or of a GGUF file. Raises ValueError with every problem it has."""
    if gguf_check.is_mine(folder):
        _insist(folder, gguf_check.problems(folder))
        return "gguf"
    if openvino_check.is_mine(folder):
        _insist(folder, openvino_check.problems(folder))
        return "openvino"
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"'{folder}' has no config.json and no .gguf file, so it is no exported "
            "drafter; give a folder written by `python -m export run=<run>`."
        )
    try:
        json.loads(config.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"'{config}' is not valid JSON ({error}), expected the configuration of a drafter, "
            "because the file was cut off or edited; export the run again."
        ) from error
    for form in FORMATS:
        if form.is_mine(folder):
            _insist(folder, form.problems(folder))
            return format_name(form)
    raise ValueError(
        f"'{config}' is in no format we know: expected '_target_' (ours), EAGLE-3 or EAGLE, "
        "'speculators_model_type', 'model_type': 'medusa', 'medusa_num_heads', 'hydra_num_heads', "
        "or a language model whose generation_config.json has num_assistant_tokens; give the "
        "folder of an exported or published drafter."
    )


def format_name(form: Any) -> str:
    """What a format is called, a module or an object."""
    return getattr(form, "name", None) or form.__name__.rpartition(".")[2]


def _insist(folder: Path, problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise ValueError(f"The export in '{folder}' would not serve:\n{lines}")
