"""A GGUF drafter as llama.cpp computes it, in a few lines of torch, from the file alone.

Written from the engine's graphs and not from the writer: rotation turns neighbouring dimensions
(2i, 2i+1) by the angle of position p and frequency i where the architecture is `llama` or `eagle3`,
dimensions (i, i + c/2) elsewhere.

Shape legend: T rows, S rows read so far, H query heads, G key and value heads, c head size, d
hidden size, D draft vocabulary, V target vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from torch.nn import functional as F

from export.base import UNLIMITED
from models.target import Features, Target


class GgufCheckpoint:
    """A file with its fields and tensors, the latter as fp32 (ids as int64)."""

    def __init__(self, file: Path, device: torch.device) -> None:
        reader = GGUFReader(file)
        self.fields: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        self.arch: str = self.fields["general.architecture"]
        self.tensors: dict[str, Tensor] = {}
        for entry in reader.tensors:
            array = entry.data.copy()
            if array.dtype.kind != "i":
                array = dequantize(array, entry.tensor_type)
            self.tensors[entry.name] = torch.from_numpy(array).to(device)

    def number(self, key: str) -> Any:
        """A field of the architecture."""
        return self.fields[f"{self.arch}.{key}"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps = self.number("attention.layer_norm_rms_epsilon")
        return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], eps)

    def attend(self, block: str, z_Te: Tensor, positions_T: Tensor, seen: "Seen") -> Tensor:
        """Causal attention over what was read before and these rows."""
        c = self.number("attention.key_length")
        q_HTc = self._heads(f"{block}.attn_q", z_Te, c, positions_T)
        seen.add(
            self._heads(f"{block}.attn_k", z_Te, c, positions_T),
            self.linear(f"{block}.attn_v", z_Te).unflatten(-1, (-1, c)).transpose(0, 1),
        )
        T, S = z_Te.shape[0], seen.keys_GSc.shape[1]
        visible_TS = torch.ones(T, S, dtype=torch.bool, device=z_Te.device).tril(S - T)
        repeat = q_HTc.shape[0] // seen.keys_GSc.shape[0]
        keys_HSc = seen.keys_GSc.repeat_interleave(repeat, 0)
        scores_HTS = q_HTc @ keys_HSc.transpose(-1, -2) / c**0.5
        weights_HTS = scores_HTS.masked_fill(~visible_TS, float("-inf")).softmax(-1)
        out_HTc = weights_HTS @ seen.values_GSc.repeat_interleave(repeat, 0)
        return self.linear(f"{block}.attn_output", out_HTc.transpose(0, 1).flatten(1))

    def mlp(self, block: str, x: Tensor) -> Tensor:
        gated = F.silu(self.linear(f"{block}.ffn_gate", x)) * self.linear(f"{block}.ffn_up", x)
        return self.linear(f"{block}.ffn_down", gated)

    def _heads(self, name: str, z_Te: Tensor, c: int, positions_T: Tensor) -> Tensor:
        x_HTc = self.linear(name, z_Te).unflatten(-1, (-1, c)).transpose(0, 1)
        if f"{name}_norm.weight" in self.tensors:
            x_HTc = self.norm(f"{name}_norm", x_HTc)
        powers = torch.arange(0, c, 2, device=z_Te.device) / c
        frequencies = self.number("rope.freq_base") ** -powers
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.tensors["rope_freqs.weight"]
        angles_Tc = positions_T[:, None] * frequencies
        pairs = (-1, 2) if self.arch in ("llama", "eagle3") else (2, -1)
        first, second = x_HTc.unflatten(-1, pairs).unbind(-1 if pairs[1] == 2 else -2)
        cos, sin = angles_Tc.cos(), angles_Tc.sin()
        turned = (first * cos - second * sin, first * sin + second * cos)
        return torch.stack(turned, -1 if pairs[1] == 2 else -2).flatten(-2)


class Seen:
    """Keys and values of one layer."""

    def __init__(self) -> None:
        self.keys_GSc = self.values_GSc = torch.empty(0)

    def add(self, keys: Tensor, values: Tensor) -> None:
        if self.keys_GSc.numel():
            keys = torch.cat([self.keys_GSc, keys], 1)
            values = torch.cat([self.values_GSc, values], 1)
        self.keys_GSc, self.values_GSc = keys, values


class GgufModel:
    """A drafter that is a language model."""

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file = GgufCheckpoint(file, device)

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Greedy: the text is read once, then each draft after it."""
        blocks = [Seen() for _ in range(self.file.number("block_count"))]
        drafted: list[int] = []
        rows_T, start = tokens_1T[0], 0
        for _ in range(UNLIMITED):
            logits_V = self.logits(rows_T, start, blocks)[-1]
            start += len(rows_T)
            drafted.append(int(logits_V.argmax()))
            rows_T = tokens_1T.new_tensor(drafted[-1:])
        return drafted

    def logits(self, tokens_T: Tensor, start: int, blocks: list[Seen]) -> Tensor:
        """`[T, V]` of tokens at positions start, start + 1, ..."""
        f = self.file
        x_Td = f.tensors["token_embd.weight"][tokens_T]
        positions_T = torch.arange(start, start + len(tokens_T), device=x_Td.device)
        for i, seen in enumerate(blocks):
            block = f"blk.{i}"
            x_Td = x_Td + f.attend(block, f.norm(f"{block}.attn_norm", x_Td), positions_T, seen)
            x_Td = x_Td + f.mlp(block, f.norm(f"{block}.ffn_norm", x_Td))
        head = "output" if "output.weight" in f.tensors else "token_embd"
        return f.linear(head, f.norm("output_norm", x_Td))


class GgufEagle3:
    """An EAGLE-3 drafter, whose embedding is the target's."""

    def __init__(self, file: Path, target: Target) -> None:
        self.file = GgufCheckpoint(file, target.device)
        self.target = target

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Row t reads the features of position t and x_{t+1}; drafts read the row before them."""
        f = self.file
        layers = [features.layers[k][0].float() for k in f.number("target_layers")]
        given_Td = f.linear("fc", torch.cat(layers, dim=-1))
        seen, start, rows_T = Seen(), 0, tokens_1T[0, 1:]
        drafted: list[int] = []
        for _ in range(UNLIMITED):
            given_Td, logits_D = self._row(given_Td, rows_T, start, seen)
            start += len(rows_T)
            best = int(logits_D.argmax())
            drafted.append(int(f.tensors["d2t"][best]) if "d2t" in f.tensors else best)
            rows_T = tokens_1T.new_tensor(drafted[-1:])
        return drafted

    def _row(
        self, given_Td: Tensor, tokens_T: Tensor, start: int, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """The last row's state before the norm, `[1, d]`, and its logits."""
        f, block = self.file, "blk.0"
        embedded_Td = self.target.embed(tokens_T).float()
        normed = f.norm(f"{block}.attn_norm", embedded_Td), f.norm(f"{block}.attn_norm_2", given_Td)
        positions_T = torch.arange(start, start + len(tokens_T), device=given_Td.device)
        residual_Td = normed[1] if f.number("norm_before_residual") else given_Td
        a_Td = residual_Td + f.attend(block, torch.cat(normed, dim=-1), positions_T, seen)
        y_1d = (a_Td + f.mlp(block, f.norm(f"{block}.ffn_norm", a_Td)))[-1:]
        return y_1d, f.linear("output", f.norm("output_norm", y_1d))[0]
