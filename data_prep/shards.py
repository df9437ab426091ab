"""A dataset on disk: token shards, what the target computed, and the manifest that vouches for it.

    <root>/<name>/
        manifest.json                  target, settings, counts, size and sha256 of every shard
        train/tokens-00000.parquet     one row an example
        train/features-00000.safetensors   optional: what the target computed, all positions
        train/topk16-00000.safetensors     optional: a signal (data_prep/signal.py), by its name
        val/...

Features are stored for consecutive rows, their positions one behind the other, so that an example
is one slice of a memory-mapped file: `final` [N, d], `layer.<k>` [N, d] and `logz` [N] (fp32), with
N the positions of all the shard's rows together.

Shape legend: B sequences (always 1 here), T positions of an example, N positions of a shard,
d hidden size, V vocabulary.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.manifest import Split, check_shard, describe, read_manifest
from data_prep.signal import SignalRows, unpack
from models.target import Features

ABOUT = "about"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("learn", pa.list_(pa.bool_())),
        ("category", pa.string()),
        ("finish_reason", pa.string()),
        ("temperature", pa.float32()),
        ("top_p", pa.float32()),
        ("seed", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Example:
    """One training sequence. `learn[i]` says whether token i itself is a token to predict.

    `finish_reason` is "eos" when the last answer ended, "length" when it was cut off, None for
    plain text; the last three fields say how the target sampled the answer, if it did.
    """

    id: str
    tokens: Tensor
    learn: Tensor
    category: str | None = None
    finish_reason: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


# --- writing -------------------------------------------------------------------------------------


def write_tokens(folder: Path, examples: Sequence[Example], per_shard: int) -> list[dict[str, Any]]:
    """Write `tokens-00000.parquet` ... into `folder`; returns their entries for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, start in enumerate(range(0, len(examples), per_shard)):
        part = examples[start : start + per_shard]
        columns = {
            "id": [e.id for e in part],
            "tokens": [e.tokens.numpy() for e in part],
            "learn": [e.learn.numpy() for e in part],
            **{
                name: [getattr(e, name) for e in part]
                for name in ("category", "finish_reason", "temperature", "top_p", "seed")
            },
        }
        path = folder / f"tokens-{number:05d}.parquet"
        temporary = path.with_suffix(".tmp")
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary, compression="zstd")
        temporary.rename(path)
        entries.append(describe(path, folder.parent) | {"rows": len(part)})
    return entries


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """One shard, atomically. `about` is stored in its header and tells shards apart.

    Under one key, because safetensors writes several in any order: the same content is then always
    the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={ABOUT: json.dumps(about, sort_keys=True)})
    temporary.chmod(0o644)  # safetensors leaves it readable for its owner only
    temporary.rename(path)


# --- reading -------------------------------------------------------------------------------------


class ShardReader:
    """The examples of one split, by index. Token shards are read at once, features as asked for.

    A shard's size and sha256 are compared with the manifest when it is opened.
    """

    def __init__(
        self, folder: Path | str, split: Split, manifest: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = manifest or read_manifest(self.folder)
        part = self.manifest["splits"][split]
        paths = [check_shard(self.folder, entry, hashes=True) for entry in part["tokens"]]
        tables = [pq.read_table(path, schema=SCHEMA) for path in paths]
        self._table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        # As offsets of the lists: Arrow's own length kernel is invisible to type checkers.
        self.lengths: list[int] = [
            length
            for chunk in self._table["tokens"].chunks
            for length in np.diff(chunk.offsets.to_numpy()).tolist()
        ]
        self._feature_entries: list[dict[str, Any]] = part["features"]
        self._signal_entries: dict[str, list[dict[str, Any]]] = part.get("signals", {})
        self._positions = [0, *accumulate(self.lengths)]  # of each row, in the whole split
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = {name: self._table[name][index] for name in SCHEMA.names}
        return Example(
            tokens=torch.from_numpy(row.pop("tokens").values.to_numpy().astype("int64")),
            learn=torch.from_numpy(row.pop("learn").values.to_numpy(zero_copy_only=False).copy()),
            **{name: value.as_py() for name, value in row.items()},
        )

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps do not travel to another process; it opens its own."""
        return self.__dict__ | {"_open": {}}

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Inner layers of the feature shards; None when there are no feature shards."""
        features = self.manifest.get("features")
        return tuple(features["layers"]) if features else None

    def features(self, index: int, layers: Sequence[int] = ()) -> tuple[Features, Tensor] | None:
        """f_t and the asked h^l_t of one example `[1, T, d]`, and logz_T; None without shards.

        logz_T[t] = logsumexp of all V logits at t, in fp32: the loss turns logits over few ids into
        exact probabilities p with it.
        """
        if self.layers is None:
            return None
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise ValueError(
                f"The feature shards in {self.folder} hold the layers {list(self.layers)}, but "
                f"layers {missing} are asked for; capture them (dataset.capture.layers) under "
                "another dataset name, or let the teacher run online."
            )
        file, first = self._find(self._feature_entries, index)
        begin = self._positions[first]
        rows = slice(self._positions[index] - begin, self._positions[index + 1] - begin)
        final_1Td = file.get_slice("final")[rows][None]
        inner = {k: file.get_slice(f"layer.{k}")[rows][None] for k in layers}
        return Features(final_1Td, inner), file.get_slice("logz")[rows]

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that are there."""
        return tuple(self.manifest.get("signals") or {})

    def signal(self, index: int, name: str) -> SignalRows:
        """What the signal `name` kept of the positions of one example that teach, in order."""
        assert name in self.signals, f"{self.folder} has no signal {name}"
        file, first = self._find(self._signal_entries[name], index)
        return unpack(file, index - first)

    def _find(self, entries: list[dict[str, Any]], index: int) -> tuple[Any, int]:
        """The open shard that holds the row `index`, and the first row in it."""
        entry = entries[bisect_right([e["rows"][0] for e in entries], index) - 1]
        if entry["file"] not in self._open:
            path = check_shard(self.folder, entry, hashes=True)
            self._open[entry["file"]] = safe_open(path, framework="pt", device="cpu")
        return self._open[entry["file"]], entry["rows"][0]


def shard_about(path: Path) -> dict[str, Any] | None:
    """The header of a finished safetensors shard; None when there is no whole one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(ABOUT, "null"))
    except SafetensorError:
        return None
