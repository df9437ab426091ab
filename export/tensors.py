"""The tensors of a checkpoint against what a format expects.

Published checkpoints are one safetensors file, several with an index, or a torch pickle: the last
is read with `weights_only=True`, which unpickles tensors and nothing else.
"""

import json
import pickle
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf.console import say

FLOATS = ("F32", "BF16", "F16")
TORCH = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FILES = ("model.safetensors", "medusa_lm_head.safetensors")
PICKLES = ("pytorch_model.bin", "medusa_lm_head.pt", "hydra_lm_head.pt")
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, safetensors before pickles."""
    for name in FILES:
        if (folder / name).is_file():
            return [folder / name]
    if (folder / INDEX).is_file():
        listed = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    for name in PICKLES:
        if (folder / name).is_file():
            return [folder / name]
    return [folder / FILES[0]]  # whose absence is then reported


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, as they are stored.

    Raises ValueError where a file is missing or holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise ValueError(
                f"'{folder}' has no weights: expected {', '.join((*FILES, INDEX, *PICKLES))}; give "
                "a whole checkpoint folder."
            )
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as reader:
                tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            continue
        say(f"{file.name} is a torch pickle: read with weights_only, tensors and nothing else.")
        loaded = _unpickled(file)
        for _ in range(2):  # some trainers wrap the tensors once
            inner = loaded.get("state_dict", loaded)
            loaded = inner if isinstance(inner, dict) else loaded
        odd = [name for name, t in loaded.items() if not isinstance(t, Tensor)]
        if odd:
            raise _more_than_tensors(file, ", ".join(map(str, odd[:3])))
        tensors |= loaded
    return tensors


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _more_than_tensors(file, str(error).splitlines()[0]) from error
    return loaded if isinstance(loaded, dict) else {"what is in it": loaded}


def _more_than_tensors(file: Path, what: str) -> ValueError:
    return ValueError(
        f"'{file}' holds more than tensors ({what}), expected the state dict of a drafter; give "
        "the file with its weights alone."
    )


def tensor_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and precisions, without reading what can be left unread."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            for name, t in load_tensors(folder).items():
                shapes[name], dtypes[name] = tuple(t.shape), TORCH.get(t.dtype, str(t.dtype))
            continue
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                part = reader.get_slice(name)
                shapes[name], dtypes[name] = tuple(part.get_shape()), part.get_dtype()
    return shapes, dtypes


def tensor_problems(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    optional: Mapping[str, tuple[int, ...]] | None = None,
    renamed: Mapping[str, str] | None = None,
    stray: str = "belongs to no part of this format",
) -> list[str]:
    """Missing, stray and misshapen tensors, and mixed precisions; one sentence each.

    A stray tensor is a fault: engines drop what they do not know in silence, and a drafter must not
    carry the target's weights along. `folder` may be the file itself. `renamed` maps prefixes that
    some tools write to those expected here.
    """
    where = folder if folder.is_dir() else folder.parent
    missing = [f.name for f in weight_files(where) if not f.is_file()]
    if missing:
        return [f"{name} is missing" for name in missing]
    try:
        found, dtypes = tensor_shapes(where)
    except SafetensorError as error:
        name = weight_files(where)[0].name
        return [f"{name} is not a readable safetensors file ({error})"]
    for theirs, ours in (renamed or {}).items():
        found = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: shape
            for name, shape in found.items()
        }
    problems = shape_problems(found, expected, optional=optional, stray=stray)
    precisions = sorted({d for d in dtypes.values() if d in FLOATS})
    if len(precisions) > 1:
        problems.append(f"weights are in several precisions ({', '.join(precisions)})")
    return problems


def shape_problems(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    optional: Mapping[str, tuple[int, ...]] | None = None,
    stray: str = "belongs to no part of this format",
) -> list[str]:
    """Missing, stray and misshapen tensors by name; one sentence each."""
    known = {**(optional or {}), **expected}
    problems = [f"tensor '{name}' is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"tensor '{name}' {list(found[name])} {stray}"
        for name in sorted(found.keys() - known.keys())
    ]
    problems += [
        f"tensor '{name}' has shape {list(found[name])}, expected {list(known[name])}"
        for name in sorted(known.keys() & found.keys())
        if found[name] != tuple(known[name])
    ]
    return problems


def vocabulary_problems(ids: list[int], vocab_size: int) -> list[str]:
    """A draft vocabulary is strictly ascending and lies inside the target's."""
    problems = []
    if any(b <= a for a, b in pairwise(ids)):
        problems.append("the draft vocabulary is not strictly ascending")
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        problems.append(
            f"the draft vocabulary spans ids {min(ids)} to {max(ids)}, outside of the target's "
            f"0 to {vocab_size - 1}"
        )
    return problems


def map_problems(d2t_D: Tensor, t2d_V: Tensor | None, vocab_size: int) -> list[str]:
    """Whether d2t holds offsets (target id = i + d2t[i]) that agree with t2d.

    Absolute ids in its place draft garbage without an error in every engine: they are known by
    disagreeing with t2d, by leaving the vocabulary, or by growing at every single id (offsets of a
    real vocabulary stay equal over neighbouring ids).
    """
    if d2t_D.is_floating_point():
        return [f"d2t is stored as {d2t_D.dtype}, expected whole numbers"]
    places_D = torch.arange(len(d2t_D))
    ids_D, d2t_D = places_D + d2t_D.long(), d2t_D.long()
    absolute = (
        "d2t holds absolute ids, expected offsets (target id = i + d2t[i]): every draft would be "
        "another token"
    )
    grows = len(d2t_D) > 1 and bool((d2t_D.diff() > 0).all()) and int(d2t_D.max()) < vocab_size
    if t2d_V is not None:
        if t2d_V.numel() != vocab_size:
            return [f"t2d has {t2d_V.numel()} entries, expected one a target id ({vocab_size})"]
        kept = t2d_V.bool().nonzero()[:, 0]
        if torch.equal(kept, ids_D.sort().values):
            return _order_problems(ids_D, vocab_size)
        if torch.equal(kept, d2t_D.sort().values):
            return [absolute]
        return ["d2t and t2d name different target ids"]
    if grows:
        return [absolute]
    return _order_problems(ids_D, vocab_size)


def _order_problems(ids_D: Tensor, vocab_size: int) -> list[str]:
    """The ids are distinct and inside the target's vocabulary; their order is free."""
    return vocabulary_problems(ids_D.sort().values.tolist(), vocab_size)
