"""A dataset folder belongs to one recipe: written at its start, compared ever after."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.manifest import write_json

RECIPE = "recipe.json"


def require_same_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe into a fresh folder; in an old one raise ValueError if it is another."""
    path = folder / RECIPE
    recipe = json.loads(json.dumps(recipe))
    if not path.exists():
        write_json(path, recipe)
        return
    differing = list(_differences(json.loads(path.read_text(encoding="utf-8")), recipe))
    if differing:
        raise ValueError(
            f"The dataset folder {folder} was started with other settings: "
            f"{'; '.join(differing)}. Go back to them, choose another dataset.name, or delete "
            "the folder so that it is made anew."
        )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two recipes differ, as "respond.max_new_tokens 64 -> 128"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            # A source file that is not here any more has no size; what was made of it still counts.
            if key != "bytes" or (old.get(key) and new.get(key)):
                yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{path}[{i}]")
    elif old != new:
        yield f"{path} {_brief(old)} -> {_brief(new)}"


def _brief(value: Any) -> str:
    text = f"{len(value)} entries" if isinstance(value, (list, dict)) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
