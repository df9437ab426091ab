"""A finished dataset, as training and measuring read it."""

from pathlib import Path
from typing import Any

from data_prep.manifest import (
    Split,
    dataset_hash,
    read_manifest,
    require_same_target,
    verify,
)
from data_prep.shards import ShardReader
from models.target import Target


class DatasetFolder:
    """A finished dataset on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)

    @property
    def hash(self) -> str:
        return dataset_hash(self.manifest)

    def reader(self, split: Split) -> ShardReader:
        return ShardReader(self.path, split)

    def check(self, target: Target, *, layers: tuple[int, ...] | None = None) -> None:
        """Refuse a target, chat template or layer set that these shards were not made for."""
        require_same_target(self.manifest, target, where=str(self.path), layers=layers)

    def verify(self) -> None:
        """Compare every shard's size and sha256 with the manifest."""
        verify(self.path, self.manifest)
