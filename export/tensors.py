"""The tensors of a safetensors file against what a format expects."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open

FLOATS = ("F32", "BF16", "F16")


def tensor_problems(file: Path, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Missing, stray and misshapen tensors, and mixed precisions; one sentence each.

    A stray tensor is a fault: engines drop what they do not know in silence, and a drafter must not
    carry the target's weights along.
    """
    if not file.is_file():
        return [f"{file.name} is missing"]
    try:
        with safe_open(file, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
            found = {name: tuple(s.get_shape()) for name, s in slices.items()}
            dtypes = {name: s.get_dtype() for name, s in slices.items()}
    except SafetensorError as error:
        return [f"{file.name} is not a readable safetensors file ({error})"]
    problems = [f"tensor '{name}' is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"tensor '{name}' {list(found[name])} belongs to no part of this format"
        for name in sorted(found.keys() - expected.keys())
    ]
    problems += [
        f"tensor '{name}' has shape {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != tuple(expected[name])
    ]
    precisions = sorted({d for d in dtypes.values() if d in FLOATS})
    if len(precisions) > 1:
        problems.append(f"weights are in several precisions ({', '.join(precisions)})")
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
