"""Validate an exported folder, whatever its format: `python -m export check=<folder>`."""

import json
from pathlib import Path

from export import assistant, hf, vllm

FORMATS = (hf, vllm, assistant)


def check_export(folder: Path) -> str:
    """The name of the folder's format. Raises ValueError with every problem it has."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"'{folder}' has no config.json, so it is no exported drafter; give a folder written "
            "by `python -m export run=<run>`."
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
            problems = form.problems(folder)
            if problems:
                lines = "\n".join(f"  - {p}" for p in problems)
                raise ValueError(f"The export in '{folder}' would not serve:\n{lines}")
            return form.__name__.rpartition(".")[2]
    raise ValueError(
        f"'{config}' is in no format we write: expected '_target_' (ours), 'model_type': "
        "'medusa' (vLLM) or a language model whose generation_config.json has "
        "num_assistant_tokens (assistant); give a folder written by `python -m export run=<run>`."
    )
