"""Validate a GGUF drafter: what llama.cpp would refuse, or would draft otherwise in silence."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from numpy.typing import NDArray

from export.tensors import shape_problems

Shapes = dict[str, tuple[int, ...]]
FIELDS = {
    "block_count": int,
    "embedding_length": int,
    "feed_forward_length": int,
    "attention.head_count": int,
    "attention.head_count_kv": int,
    "attention.key_length": int,
    "attention.layer_norm_rms_epsilon": float,
    "rope.freq_base": float,
    "vocab_size": int,
}
EAGLE3_FIELDS = ("target_layers", "target_hidden_size", "norm_before_residual")
ARCHITECTURES = ("eagle3", "llama", "qwen2", "qwen3")


def is_mine(path: Path) -> bool:
    """Whether this is a GGUF file, or a folder with one."""
    return path.suffix == ".gguf" or len(list(path.glob("*.gguf"))) == 1


def problems(path: Path) -> list[str]:
    """What is wrong with a drafter: what llama.cpp refuses, or drafts otherwise in silence."""
    file = path if path.suffix == ".gguf" else next(path.glob("*.gguf"))
    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        return [f"{file.name} is not a readable GGUF file ({error})"]
    fields = {k: f.contents() for k, f in reader.fields.items()}
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        return [f"general.architecture is {arch}, expected one of {', '.join(ARCHITECTURES)}"]
    wanted = [*FIELDS, *(EAGLE3_FIELDS if arch == "eagle3" else ())]
    absent = [
        f"the field {arch}.{key} is missing" for key in wanted if f"{arch}.{key}" not in fields
    ]
    if absent:
        return absent
    size = {key: kind(fields[f"{arch}.{key}"]) for key, kind in FIELDS.items()}
    found = _tokenizer_problems(fields, size["vocab_size"])
    tensors: Shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
    if arch == "eagle3":
        ids = next((t.data for t in reader.tensors if t.name == "d2t"), None)
        found += _eagle3_problems(fields, size["vocab_size"], ids)
        expected = _eagle3_shapes(size, None if ids is None else len(ids))
    else:
        expected = _model_shapes(arch, size, tensors)
    if "rope_freqs.weight" in tensors:
        expected["rope_freqs.weight"] = (size["attention.key_length"] // 2,)
    found += shape_problems(tensors, expected)
    precisions = sorted({t.tensor_type.name for t in reader.tensors if len(t.shape) > 1})
    if len(precisions) > 1:
        found.append(f"matrices are in several precisions ({', '.join(precisions)})")
    return found


def _layer_shapes(size: dict[str, Any], block: str, width: int) -> Shapes:
    """One decoder layer whose attention reads `width` numbers a position."""
    d, hidden, c = (
        size[k] for k in ("embedding_length", "feed_forward_length", "attention.key_length")
    )
    queries, keys = size["attention.head_count"] * c, size["attention.head_count_kv"] * c
    shapes: Shapes = {
        "attn_norm": (d,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (d, queries),
        "ffn_norm": (d,),
        "ffn_gate": (hidden, d),
        "ffn_up": (hidden, d),
        "ffn_down": (d, hidden),
    }
    return {f"{block}.{name}.weight": shape for name, shape in shapes.items()}


def _model_shapes(arch: str, size: dict[str, Any], found: Shapes) -> Shapes:
    d, vocab, c = (size[k] for k in ("embedding_length", "vocab_size", "attention.key_length"))
    expected: Shapes = {"token_embd.weight": (vocab, d), "output_norm.weight": (d,)}
    if "output.weight" in found:  # else it is the embedding
        expected["output.weight"] = (vocab, d)
    for i in range(size["block_count"]):
        expected |= _layer_shapes(size, f"blk.{i}", d)
        for name in ("attn_q", "attn_k", "attn_v"):
            if arch == "qwen2" or f"blk.{i}.{name}.bias" in found:
                expected[f"blk.{i}.{name}.bias"] = expected[f"blk.{i}.{name}.weight"][:1]
        if arch == "qwen3":
            expected |= {f"blk.{i}.{name}_norm.weight": (c,) for name in ("attn_q", "attn_k")}
    return expected


def _eagle3_shapes(size: dict[str, Any], drafted: int | None) -> Shapes:
    d = size["embedding_length"]
    expected = _layer_shapes(size, "blk.0", 2 * d)
    expected["blk.0.attn_norm_2.weight"] = expected["output_norm.weight"] = (d,)
    expected["fc.weight"] = (d, 3 * d)
    expected["output.weight"] = (size["vocab_size"] if drafted is None else drafted, d)
    return expected if drafted is None else expected | {"d2t": (drafted,)}


def _eagle3_problems(fields: dict[str, Any], vocab: int, ids: NDArray[Any] | None) -> list[str]:
    found = []
    layers = fields["eagle3.target_layers"]
    if len(layers) != 3 or list(layers) != sorted(layers) or layers[0] < 0:
        found.append(f"eagle3.target_layers is {layers}, expected three ascending layers")
    if fields["eagle3.block_count"] != 1:
        found.append(f"eagle3.block_count is {fields['eagle3.block_count']}, expected 1")
    if not isinstance(fields["eagle3.norm_before_residual"], bool):
        found.append("eagle3.norm_before_residual is no boolean")
    if ids is None:
        return found
    if ids.dtype != "int64":
        found.append(f"d2t is {ids.dtype}, expected int64")
    if any(b <= a for a, b in pairwise(ids.tolist())):
        found.append(
            "d2t is not strictly ascending: here it holds absolute ids of the target, not offsets"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        found.append(f"d2t spans {ids.min()} to {ids.max()}, outside of the target's {vocab} ids")
    return found


def _tokenizer_problems(fields: dict[str, Any], vocab: int) -> list[str]:
    """llama.cpp compares the pair's vocabularies and refuses a drafter without one."""
    found = [
        f"the field tokenizer.ggml.{key} is missing"
        for key in ("model", "tokens", "token_type")
        if f"tokenizer.ggml.{key}" not in fields
    ]
    for key in ("tokens", "token_type"):
        count = len(fields.get(f"tokenizer.ggml.{key}", range(vocab)))
        if count != vocab:
            found.append(f"tokenizer.ggml.{key} has {count} entries, expected {vocab}")
    if fields.get("tokenizer.ggml.model") == "gpt2":
        found += [
            f"the field tokenizer.ggml.{key} is missing"
            for key in ("merges", "pre")
            if f"tokenizer.ggml.{key}" not in fields
        ]
    return found
