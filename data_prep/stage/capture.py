"""What the target computes for each example, written down once, so that training need not run it.

Features: f_t, chosen h^l_t and logz_t of every position, (1 + layers) * d * 2 bytes a token in
bf16; they serve every drafter and every loss. A signal (data_prep/signal.py) keeps a few numbers of
p at the positions that teach: far less, for drafters that read tokens only. A dataset may hold
features and several signals; what is missing is added to it without answering anything again.

Shape legend: B examples of a batch, T positions, N positions of a shard laid end to end, n a few
positions, d hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from conf.console import say
from data_prep.conversation import stable_hash
from data_prep.manifest import SPLITS, Split, describe
from data_prep.progress import Progress
from data_prep.shards import Example, ShardReader, shard_about, write_tensors
from data_prep.signal import Signal, SignalRows, pack, teaches
from models.target import Target

PROJECT_ROWS = 1024
"""Positions whose V logits exist at the same time while logz is computed."""
SIGNAL_ROWS = 256
"""The same for a signal, which needs several numbers of 8 bytes for each of the V."""
ENTRY_BYTES = 20
"""One entry of a signal before it is packed."""
FEATURES = "features"


@dataclass(kw_only=True)
class Capture:
    """`features`: the final ones, and the inner `layers` a drafter reads beside them.

    `signal`: what to keep of p instead, or beside them; null for nothing.
    """

    layers: list[int] = field(default_factory=list)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_tokens: int = 4096
    shard_bytes: int = 512 * 2**20
    features: bool = True
    signal: Signal | None = None

    def __post_init__(self) -> None:
        if not self.features and self.signal is None:
            raise ValueError(
                "dataset.capture has features=false and signal=null, so there would be nothing to "
                "capture; expected at least one of them. Use capture: null for neither."
            )
        if self.layers and not self.features:
            raise ValueError(
                f"dataset.capture has layers={self.layers} with features=false, but inner layers "
                "are features; leave layers empty, or set features=true."
            )

    def check(self, target: Target) -> None:
        """Layer k is the residual stream after k decoder layers."""
        odd = [k for k in self.layers if not 0 <= k <= target.num_layers]
        if odd:
            raise ValueError(
                f"dataset.capture.layers={self.layers} names {odd}, but '{target.name}' has layers "
                f"0 (the embedding) to {target.num_layers} (before the final norm); its final "
                "hidden state, after the norm, is always captured. Give numbers in that range."
            )
        if self.signal:
            self.signal.check(target.vocab_size)

    @property
    def parts(self) -> list[str]:
        """What is captured: the first part of the shards' names."""
        return [FEATURES] * self.features + ([self.signal.name] if self.signal else [])

    def missing(self, manifest: dict[str, Any]) -> "Capture | None":
        """What of this a finished dataset does not hold; None when it holds everything."""
        features = self.features and not manifest["features"]
        stored = self.signal is None or self.signal.name in manifest.get("signals", {})
        signal = None if stored else self.signal
        if not features and signal is None:
            return None
        layers = self.layers if features else []
        return replace(self, features=features, layers=layers, signal=signal)

    def feature_bytes(self, target: Target) -> int:
        """Bytes of a token, taught or not."""
        width = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return (1 + len(set(self.layers))) * target.hidden_size * width + 4

    def about(self) -> dict[str, Any]:
        """What the manifest says of the feature shards."""
        return {"layers": sorted(set(self.layers)), "dtype": self.dtype}

    def run(
        self, target: Target, folder: Path, readers: dict[Split, ShardReader]
    ) -> dict[Split, dict[str, list[dict[str, Any]]]]:
        """Write the shards that are not there yet; returns the manifest's entries, by part."""
        self.check(target)
        entries: dict[Split, dict[str, list[dict[str, Any]]]] = {
            split: {part: [] for part in self.parts} for split in SPLITS
        }
        total = sum(sum(reader.lengths) for reader in readers.values())
        what = f"capturing {' and '.join(self.parts)}"
        with Progress(what, total=total, unit="tokens") as progress:
            for split, reader in readers.items():
                for number, (first, last) in enumerate(self._ranges(target, reader.lengths)):
                    paths = {
                        part: folder / split / f"{part}-{number:05d}.safetensors"
                        for part in self.parts
                    }
                    examples = [reader[i] for i in range(first, last)]
                    finals = stored_finals(target, reader, range(first, last))
                    self._shards(target, paths, examples, finals, progress)
                    for part, path in paths.items():
                        entries[split][part].append(
                            describe(path, folder) | {"rows": [first, last]}
                        )
        return entries

    def _ranges(self, target: Target, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Consecutive rows that fill about one shard, and fit into memory."""
        each = self.feature_bytes(target) if self.features else 0
        if self.signal:
            each += self.signal.most * ENTRY_BYTES
        limit = max(1, self.shard_bytes // each)
        ranges, first, size = [], 0, 0
        for row, length in enumerate(lengths):
            if row > first and size + length > limit:
                ranges.append((first, row))
                first, size = row, 0
            size += length
        return [*ranges, (first, len(lengths))] if lengths else []

    def _shards(
        self,
        target: Target,
        paths: dict[str, Path],
        examples: list[Example],
        finals: list[Tensor] | None,
        progress: Progress,
    ) -> None:
        """The shards of one range of rows, in one pass of the target over it (or of its vocabulary
        head alone, where `finals` holds its states from feature shards)."""
        headers = {part: self._header(target, part, examples) for part in paths}
        size = sum(len(e.tokens) for e in examples)
        left = {part: path for part, path in paths.items() if shard_about(path) != headers[part]}
        for path in paths.values():
            if path not in left.values():
                say(f"{path.name} ({path.parent.name}) is already there.")
        if not left:
            progress.advance(size)
            return
        todo = replace(
            self,
            features=FEATURES in left,
            layers=self.layers if FEATURES in left else [],
            signal=self.signal if self.signal and self.signal.name in left else None,
        )
        starts = [0, *accumulate(len(e.tokens) for e in examples)]
        features: dict[str, Tensor] = {}
        signals: dict[int, SignalRows] = {}
        for rows in batches_by_length([len(e.tokens) for e in examples], self.batch_tokens):
            batch = [examples[i] for i in rows]
            if finals is None or todo.features:
                made = compute(target, batch, todo)
            else:
                made = [project(target, examples[i], finals[i], todo) for i in rows]
            for i, computed in zip(rows, made, strict=True):
                for name, value in computed.features.items():
                    if name not in features:
                        features[name] = value.new_empty(size, *value.shape[1:])
                    features[name][starts[i] : starts[i + 1]] = value
                if computed.signal is not None:
                    signals[i] = computed.signal
            count = sum(len(e.tokens) for e in batch)
            progress.advance(count, tokens=count)
        for part, path in left.items():
            tensors = features
            if part != FEATURES:
                rows_in_order = [signals[i] for i in range(len(examples))]
                lengths = [len(r) for r in rows_in_order]
                tensors = pack(SignalRows.join(rows_in_order), lengths, target.vocab_size)
            write_tensors(path, tensors, headers[part])

    def _header(self, target: Target, part: str, examples: Sequence[Example]) -> dict[str, Any]:
        """A shard left by an interrupted run is taken over only if all of this is the same."""
        digest = hashlib.sha256()
        for example in examples:
            digest.update(example.tokens.numpy().tobytes())
        header = {"target": target.fingerprint(), "tokens": digest.hexdigest()}
        if part == FEATURES:
            return header | {FEATURES: self.about()}
        assert self.signal is not None
        for example in examples:
            digest.update(example.id.encode() + example.learn.numpy().tobytes())
        return header | {"examples": digest.hexdigest(), "signal": self.signal.about()}


@dataclass(frozen=True)
class Computed:
    """Of one example, on the CPU: tensors of a feature shard [T, ...], and its signal."""

    features: dict[str, Tensor]
    signal: SignalRows | None


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most `batch_tokens` padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first of a batch is its longest.
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.inference_mode()
def compute(target: Target, examples: Sequence[Example], capture: Capture) -> list[Computed]:
    """What `capture` asks for of each example.

    Padded on the right, where a causal model cannot look.
    """
    longest = max(len(e.tokens) for e in examples)
    tokens_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        tokens_BT[row, : len(example.tokens)] = example.tokens
    features = target.forward(tokens_BT.to(target.device), layers=tuple(sorted(capture.layers)))
    out = []
    for row, example in enumerate(examples):
        stored: dict[str, Tensor] = {}
        if capture.features:
            dtype = getattr(torch, capture.dtype)
            stored["final"] = features.final_BTd[row, : len(example.tokens)].to(dtype)
            stored["logz"] = _logz(target, stored["final"])
            for k, hidden_BTd in features.layers.items():
                stored[f"layer.{k}"] = hidden_BTd[row, : len(example.tokens)].to(dtype)
        signal = None
        if capture.signal:
            final_nd = features.final_BTd[row, teaches(example.learn)]
            signal = signal_of(target, final_nd, capture.signal, example.id)
        out.append(Computed({name: value.cpu() for name, value in stored.items()}, signal))
    return out


@torch.inference_mode()
def project(target: Target, example: Example, final_Td: Tensor, capture: Capture) -> Computed:
    """The signal of one example whose final states are there already."""
    assert capture.signal is not None
    final_nd = final_Td.to(target.device)[teaches(example.learn)]
    return Computed({}, signal_of(target, final_nd, capture.signal, example.id))


def stored_finals(target: Target, reader: ShardReader, rows: range) -> list[Tensor] | None:
    """The final states in the dataset's feature shards; None without any, or when they were rounded
    to another dtype than the target computes in."""
    about = reader.manifest.get("features")
    if not about or getattr(torch, about["dtype"]) != target.dtype:
        return None
    found = [reader.features(i) for i in rows]
    return [features.final_BTd[0] for features, _ in (f for f in found if f is not None)]


def _logz(target: Target, final_Td: Tensor) -> Tensor:
    """From the features as they are stored, so that softmax(W f) over all V sums to exactly one."""
    return torch.cat(
        [
            target.project(part_nd.to(target.dtype)).float().logsumexp(-1)
            for part_nd in final_Td.split(PROJECT_ROWS)
        ]
    )


def signal_of(target: Target, final_nd: Tensor, signal: Signal, example_id: str) -> SignalRows:
    """The signal of one example, from the target's own features, on the CPU.

    Its draws depend on the example alone, not on the batch it happens to be in.
    """
    noise = torch.Generator().manual_seed(stable_hash(f"{signal.seed} {example_id}") % 2**63)
    # An example that teaches nothing still has its (empty) rows.
    parts = final_nd.split(SIGNAL_ROWS) if len(final_nd) else [final_nd]
    return SignalRows.join(
        [signal.take(target.project(part_nd), noise).to(torch.device("cpu")) for part_nd in parts]
    )
