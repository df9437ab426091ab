"""EAGLE-3 in the format of the speculators library (0.9), which vLLM serves by itself.

The weights are those of the native folder (eagle3.py) with the layer called `layers.0`; config.json
puts the layer's shape into `transformer_layer_config` and says what target (verifier) it is for and
how many drafts to make. Its layer ids count layers before the feature, like ours, and are there
once. The target's embedding is written too: the library means to read it from the target where the
file has none, but leaves the matrix uninitialised (0.9.0). vLLM finds it equal and shares its own.

Shape legend: d hidden size, D draft vocabulary, V target vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from export.base import Reader
from export.formats.base import Format, floats, read_config, write_files
from export.formats.dflash import speculators_dflash_problems
from export.formats.eagle3 import (
    Eagle3Checkpoint,
    Eagle3Format,
    native_config,
    native_tensors,
)
from export.formats.eagle3_check import (
    FLAGS,
    IDS,
    STRAY,
    expected_tensors,
    vocabulary_map_problems,
)
from export.formats.layer import layer_config_problems
from export.tensors import load_tensors, tensor_problems
from models.drafter.base import Drafter
from models.drafter.eagle3 import Eagle3
from models.target import Target, resolve_name

VERSION = "0.9.0"
EMBEDDING = "embed_tokens.weight"
KINDS = ("eagle3", "peagle", "dflash")
"""`speculators_model_type`s that can be checked here."""


class SpeculatorsFormat(Format):
    """`verifier` is the target as serving will load it; None is the name it was trained under (the
    cached folder, for one out of an installed package)."""

    name = "speculators"
    families = (Eagle3,)

    def __init__(self, *, gamma: int = 3, verifier: str | None = None) -> None:
        self.gamma, self.verifier = gamma, verifier

    def complaint(self, drafter: Drafter) -> str | None:
        return Eagle3Format().complaint(drafter)

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, Eagle3)
        native = native_config(drafter)
        target = drafter.target
        outside = {
            "architectures",
            "torch_dtype",
            "draft_vocab_size",
            "target_hidden_size",
            "num_aux_hidden_states",
            "eagle_config",
            IDS,
            *FLAGS,
        }
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": self.gamma,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": VERSION,
            "dtype": native["torch_dtype"],
            "draft_vocab_size": native["draft_vocab_size"],
            **{flag: native[flag] for flag in FLAGS},
            "embed_requires_grad": False,
            "target_hidden_size": None,
            IDS: native[IDS],
            "tie_word_embeddings": False,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {
                    "name_or_path": self.verifier or resolve_name(target.name),
                    "architectures": list(target.config.architectures or []),
                },
            },
            "transformer_layer_config": {k: v for k, v in native.items() if k not in outside},
        }
        tensors = native_tensors(drafter, "layers.0")
        tensors[EMBEDDING] = target.embedding_weight_Vd
        write_files(folder, config, tensors, drafter.dtype)

    def read(self, folder: Path, target: Target) -> Reader:
        config = flat(read_config(folder))
        return Eagle3Checkpoint(config, floats(folder, target.device), target)

    def is_mine(self, folder: Path) -> bool:
        return "speculators_model_type" in read_config(folder)

    def problems(self, folder: Path) -> list[str]:
        config = read_config(folder)
        kind = config["speculators_model_type"]
        if kind not in KINDS:
            return [f"speculators_model_type is '{kind}', expected one of {', '.join(KINDS)}"]
        found = _verifier_problems(config)
        if "transformer_layer_config" not in config:
            return [*found, "config.json has no 'transformer_layer_config'"]
        inner = config["transformer_layer_config"]
        found += [f"transformer_layer_config: {p}" for p in layer_config_problems(inner)]
        if "draft_vocab_size" not in config:
            found.append(
                "config.json has no 'draft_vocab_size', for which speculators takes 32,000"
            )
        if kind == "dflash":
            return found + speculators_dflash_problems(folder, config)
        if "norm_before_residual" not in config:
            found.append(
                "config.json has no 'norm_before_residual', for which vLLM takes true and "
                "speculators false: it would accept nothing"
            )
        if not config.get(IDS):
            found.append(f"config.json has no '{IDS}', so that every reader takes its own default")
        if kind == "peagle" and "mask_token_id" not in config:
            found.append("config.json has no 'mask_token_id', which parallel drafting needs")
        if any(k not in inner for k in ("hidden_size", "vocab_size", "num_attention_heads")):
            return found
        expected, optional = expected_tensors(flat(config), "layers.0")
        expected[EMBEDDING] = optional.pop(EMBEDDING)
        if kind == "peagle":
            width = expected["fc.weight"][1]
            expected["mask_hidden"] = (1, 1, width)
        found += tensor_problems(folder, expected, optional=optional, stray=STRAY)
        return found + vocabulary_map_problems(folder, flat(config))

    def load(self, folder: Path, target: Target) -> Drafter:
        from export.formats.eagle3_import import load_eagle3

        config = read_config(folder)
        if config["speculators_model_type"] != "eagle3":
            raise ValueError(
                f"'{folder}' holds a speculators model of type "
                f"'{config['speculators_model_type']}', expected eagle3, the only one there is a "
                "family for here; it cannot be imported."
            )
        return load_eagle3(flat(config), load_tensors(folder), target)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of both levels as a native config.json has them (outer ones win)."""
    ours = {k: v for k, v in config.items() if k != "architectures" and v is not None}
    return {**config["transformer_layer_config"], **ours}


def _verifier_problems(config: dict[str, Any]) -> list[str]:
    inner = config.get("speculators_config") or {}
    methods, verifier = inner.get("proposal_methods") or [], inner.get("verifier") or {}
    found = []
    if not methods or not methods[0].get("speculative_tokens"):
        found.append("speculators_config says nowhere how many tokens to draft")
    if not verifier.get("name_or_path"):
        found.append("speculators_config names no verifier, and vLLM serves the one it names")
    return found
