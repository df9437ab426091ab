"""A folder's contents as a short name, so that what is converted from it is converted once."""

import hashlib
from pathlib import Path

from export.tensors import weight_files


def digest(folder: Path) -> str:
    """16 hex digits of a plain model folder: configuration, tokenizer and weights."""
    made = hashlib.sha256()
    for file in (folder / "config.json", folder / "tokenizer.json", *weight_files(folder)):
        with file.open("rb") as handle:
            made.update(hashlib.file_digest(handle, "sha256").digest())
    return made.hexdigest()[:16]
