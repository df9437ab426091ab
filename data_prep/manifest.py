"""The manifest of a dataset: what was made, by which target, and the hashes that vouch for it."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from models.target import Target

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
MANIFEST = "manifest.json"


def describe(path: Path, root: Path) -> dict[str, Any]:
    """A shard's manifest entry: name, size, sha256."""
    return {
        "file": path.relative_to(root).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


def write_json(path: Path, content: Any) -> None:
    """Write under a temporary name, then rename: a reader never meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def describe_target(target: Target) -> dict[str, Any]:
    """What is stored about the target that answered, and compared when it is used again."""
    return {
        "name": target.name,
        "revision": target.revision,
        "fingerprint": target.fingerprint(),
        "template_hash": target.template_hash(),
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "num_layers": target.num_layers,
        "dtype": str(target.dtype).removeprefix("torch."),
    }


def draftsmith_version() -> str:
    """The installed version; a checkout that is not installed says so."""
    try:
        return importlib.metadata.version("draftsmith")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError when there is no finished dataset in `folder`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no finished dataset ({MANIFEST} is missing); run "
            "`python -m data_prep dataset=<name>`, which also continues an interrupted one."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def dataset_hash(manifest: dict[str, Any]) -> str:
    """sha256 over the hashes of all shards: tokens, features, then signals by name, in order."""
    hashes = [s["sha256"] for split in SPLITS for s in _shards(manifest, split)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def require_same_target(
    manifest: dict[str, Any], target: Target, *, where: str, layers: Iterable[int] | None = None
) -> None:
    """Refuse shards of another target, chat template or layer set, naming the difference.

    `layers` are the inner layers that feature shards must hold; None asks for none.
    """
    made, ours = manifest["target"], describe_target(target)
    for key, name, advice in (
        ("fingerprint", "target", "Answers of one model do not teach the drafter of another"),
        ("template_hash", "chat template", "Prompts would be rendered in another way than learned"),
        ("vocab_size", "vocabulary size", "Token ids would not mean the same"),
    ):
        if made[key] != ours[key]:
            raise ValueError(
                f"The dataset in {where} was made with another {name}: {key} {made[key]} "
                f"('{made['name']}') there, {ours[key]} ('{ours['name']}') here. {advice}; use "
                "that target, or another dataset name so that the data is made anew."
            )
    if layers is None or not manifest.get("features"):
        return
    stored = set(manifest["features"]["layers"])
    missing = sorted(set(layers) - stored)
    if missing:
        raise ValueError(
            f"The feature shards in {where} hold the layers {sorted(stored)}, but layers {missing} "
            "are also needed; capture them (dataset.capture.layers) under another dataset name, or "
            "let the teacher run online."
        )


def verify(folder: Path, manifest: dict[str, Any], *, hashes: bool = True) -> None:
    """Refuse a missing shard, one of another size and, with `hashes`, one of other content."""
    for split in SPLITS:
        for entry in _shards(manifest, split):
            check_shard(folder, entry, hashes=hashes)


def verify_tokens(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a token shard that is not, by size and content, what the manifest says."""
    for split in SPLITS:
        for entry in manifest["splits"][split]["tokens"]:
            check_shard(folder, entry, hashes=True)


_checked: dict[tuple[str, int, int], str] = {}
"""sha256 of files this process has read once, by (path, size, time of change)."""


def check_shard(folder: Path, entry: dict[str, Any], *, hashes: bool) -> Path:
    """The path of a shard that is what the manifest says; ValueError otherwise."""
    path = folder / entry["file"]
    advice = (
        "it was damaged or replaced; delete the dataset folder and run `python -m data_prep` "
        "again, or copy the shard anew"
    )
    if not path.is_file():
        raise ValueError(f"The shard {path} named in the manifest is missing; {advice}.")
    stat = path.stat()
    if stat.st_size != entry["bytes"]:
        raise ValueError(
            f"The shard {path} has {stat.st_size} bytes, the manifest says {entry['bytes']}: "
            f"{advice}."
        )
    if hashes:
        key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
        if key not in _checked:
            _checked[key] = sha256_of(path)
        if _checked[key] != entry["sha256"]:
            raise ValueError(
                f"The shard {path} has sha256 {_checked[key][:12]}..., the manifest says "
                f"{entry['sha256'][:12]}...: {advice}."
            )
    return path


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(manifest: dict[str, Any], split: Split) -> list[dict[str, Any]]:
    part = manifest["splits"][split]
    signals = [entry for _, entries in sorted(part.get("signals", {}).items()) for entry in entries]
    return [*part["tokens"], *part["features"], *signals]
