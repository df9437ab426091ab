"""What the target computes for each example, written down once: f_t, chosen h^l_t and logz_t.

Saves the target's forward in every epoch, for disk: (1 + layers) * d * 2 bytes a token in bf16.

Shape legend: B examples of a batch, T positions, N positions of a shard laid end to end, d hidden
size, V vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from conf.console import say
from data_prep.manifest import SPLITS, Split, describe
from data_prep.progress import Progress
from data_prep.shards import Example, ShardReader, feature_shard_about, write_features
from models.target import Target

PROJECT_ROWS = 1024
"""Positions whose V logits exist at the same time while logz is computed."""


@dataclass(kw_only=True)
class Capture:
    """Final features always; `layers` are the inner layers a drafter reads beside them."""

    layers: list[int] = field(default_factory=list)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_tokens: int = 4096
    shard_bytes: int = 512 * 2**20

    def check(self, target: Target) -> None:
        """Layer k is the residual stream after k decoder layers; the last one is never needed."""
        odd = [k for k in self.layers if not 0 <= k < target.num_layers]
        if odd:
            raise ValueError(
                f"dataset.capture.layers={self.layers} names {odd}, but '{target.name}' has layers "
                f"0 (the embedding) to {target.num_layers - 1}; its final hidden state is always "
                "captured. Give numbers in that range."
            )

    def bytes_per_token(self, target: Target) -> int:
        width = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return (1 + len(set(self.layers))) * target.hidden_size * width + 4

    def about(self) -> dict[str, Any]:
        """What the manifest says of the feature shards."""
        return {"layers": sorted(set(self.layers)), "dtype": self.dtype}

    def run(
        self, target: Target, folder: Path, readers: dict[Split, ShardReader]
    ) -> dict[Split, list[dict[str, Any]]]:
        """Write the feature shards that are not there yet; returns the manifest's entries."""
        self.check(target)
        entries: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        total = sum(sum(reader.lengths) for reader in readers.values())
        with Progress("capturing features", total=total, unit="tokens") as progress:
            for split, reader in readers.items():
                for number, (first, last) in enumerate(self._ranges(target, reader.lengths)):
                    path = folder / split / f"features-{number:05d}.safetensors"
                    examples = [reader[i] for i in range(first, last)]
                    self._shard(target, path, examples, progress)
                    entries[split].append(describe(path, folder) | {"rows": [first, last]})
        return entries

    def _ranges(self, target: Target, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Consecutive rows whose features fill about one shard."""
        limit = max(1, self.shard_bytes // self.bytes_per_token(target))
        ranges, first, size = [], 0, 0
        for row, length in enumerate(lengths):
            if row > first and size + length > limit:
                ranges.append((first, row))
                first, size = row, 0
            size += length
        return [*ranges, (first, len(lengths))] if lengths else []

    def _shard(
        self, target: Target, path: Path, examples: list[Example], progress: Progress
    ) -> None:
        about = self._header(target, examples)
        size = sum(len(e.tokens) for e in examples)
        if feature_shard_about(path) == about:
            say(f"{path.name} ({path.parent.name}) is already there.")
            progress.advance(size)
            return
        dtype = getattr(torch, self.dtype)
        final_Nd = torch.empty(size, target.hidden_size, dtype=dtype)
        layers = {k: torch.empty_like(final_Nd) for k in sorted(set(self.layers))}
        logz_N = torch.empty(size)
        starts = [0]
        for example in examples:
            starts.append(starts[-1] + len(example.tokens))
        for rows in batches_by_length([len(e.tokens) for e in examples], self.batch_tokens):
            tokens = [examples[i].tokens for i in rows]
            for i, (final_Td, inner, logz_T) in zip(
                rows, compute(target, tokens, tuple(layers), dtype), strict=True
            ):
                place = slice(starts[i], starts[i + 1])
                final_Nd[place], logz_N[place] = final_Td, logz_T
                for k, hidden_Td in inner.items():
                    layers[k][place] = hidden_Td
            count = sum(map(len, tokens))
            progress.advance(count, tokens=count)
        write_features(path, final_Nd=final_Nd, layers=layers, logz_N=logz_N, about=about)

    def _header(self, target: Target, examples: Sequence[Example]) -> dict[str, str]:
        """A shard left by an interrupted run is taken over only if all of this is the same."""
        digest = hashlib.sha256()
        for example in examples:
            digest.update(example.tokens.numpy().tobytes())
        return {
            "target": target.fingerprint(),
            "tokens": digest.hexdigest(),
            "features": json.dumps(self.about()),
        }


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
def compute(
    target: Target, tokens: Sequence[Tensor], layers: tuple[int, ...], dtype: torch.dtype
) -> list[tuple[Tensor, dict[int, Tensor], Tensor]]:
    """(f [T, d], {k: h^k [T, d]}, logz [T]) of each sequence, on the CPU.

    Padded on the right, where a causal model cannot look. logz comes from the features as they are
    stored, so that softmax(W f) over all V sums to exactly one again.
    """
    longest = max(map(len, tokens))
    tokens_BT = torch.zeros(len(tokens), longest, dtype=torch.long)
    for row, sequence in enumerate(tokens):
        tokens_BT[row, : len(sequence)] = sequence
    features = target.forward(tokens_BT.to(target.device), layers=layers)
    out = []
    for row, sequence in enumerate(tokens):
        final_Td = features.final_BTd[row, : len(sequence)].to(dtype)
        logz_T = torch.cat(
            [
                target.project(part_nd.to(target.dtype)).float().logsumexp(-1)
                for part_nd in final_Td.split(PROJECT_ROWS)
            ]
        )
        inner = {k: v[row, : len(sequence)].to(dtype).cpu() for k, v in features.layers.items()}
        out.append((final_Td.cpu(), inner, logz_T.cpu()))
    return out
