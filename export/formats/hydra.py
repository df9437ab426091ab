"""Hydra and Hydra++ heads as the original code loads them: hydra_lm_head.pt.

    hydra_mlp.{i}.{j}.linear, .res_connection   first block of head i, (i+2) d -> d, weight and bias
    hydra_mlp.{i}.{j}.linear                    the following blocks
    hydra_lm_head.{i}.weight, .bias             U_i over the whole vocabulary
    prefix_embeding_layer.layers.0.*, .norm     (sic) Hydra++'s decoder layer

In the architecture "mlp" j counts the blocks; in "prefix-mlp" every block and vocabulary matrix
stands behind a dropout: j is 1, 3, ... and the head's matrix `hydra_lm_head.{i}.1`. Blocks after
the first are one repeated object there. The prefix layer is built from the target's config.

Rows outside a reduced draft vocabulary are zero with a bias of -1e4.

Shape legend: d hidden size, D draft vocabulary, V target vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.base import Reader
from export.formats.base import Format, plain, read_config
from export.formats.importing import fill
from export.formats.layer import CheckpointLayer
from export.tensors import load_tensors, tensor_problems
from models.drafter.base import Drafter
from models.drafter.hydra_heads import HydraHeads
from models.head.frozen import FrozenHead
from models.head.own import OwnHead
from models.target import Features, Target

OUTSIDE = -1e4
"""Far below every logit, and a number in fp16 too."""
PREFIX = "prefix_embeding_layer"
OWN = {"_target_": "models.head.own.OwnHead", "bias": True}
FILE = "hydra_lm_head.pt"


class HydraFormat(Format):
    """Both architectures."""

    name = "hydra"
    families = (HydraHeads,)
    all_depths = True

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, HydraHeads)
        head = drafter.head(0)
        if not isinstance(head, (OwnHead, FrozenHead)) or head.matrix() is None:
            return (
                f"Hydra's vocabulary heads are matrices, and this drafter has a "
                f"{type(head).__name__}; train with head@drafter.head=own or =frozen."
            )
        if _num_layers(drafter) > 2:
            return (
                f"This drafter's heads have {_num_layers(drafter)} blocks with weights of their "
                "own, and the original Hydra repeats one block after the first; train with "
                "drafter.num_layers=1 or 2."
            )
        if drafter.prefix is not None:
            eps, own = _eps(drafter.target), drafter.prefix.norm.variance_epsilon
            if eps != own:
                return (
                    f"This drafter's prefix layer has norms with epsilon {own:g}, and the original "
                    f"code builds it from the target's config, which says {eps:g}."
                )
        return None

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, HydraHeads)
        prefix = drafter.prefix is not None
        config = {
            "hydra_num_heads": drafter.num_depths,
            "hydra_num_layers": _num_layers(drafter),
            "hydra_head_arch": "prefix-mlp" if prefix else "mlp",
            "grounded_heads": True,
            "hidden_state_offset": 0,
            "base_model_name_or_path": drafter.target.name,
            "hidden_size": drafter.hidden_size,
            "vocab_size": drafter.vocab_size,
        }
        tensors: dict[str, Tensor] = {}
        for i, blocks in enumerate(drafter.blocks):
            for name, tensor in blocks.state_dict().items():
                place, _, rest = name.partition(".")
                j = int(place) if prefix else int(place) // 2  # ours stand behind dropouts too
                rest = rest.replace("residual.", "res_connection.")
                tensors[f"hydra_mlp.{i}.{j}.{rest}"] = tensor
            matrix = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
            tensors[f"{matrix}.weight"], tensors[f"{matrix}.bias"] = _rows(drafter, i)
        if drafter.prefix is not None:
            for name, tensor in drafter.prefix.state_dict().items():
                if not name.startswith("rotary."):
                    tensors[f"{PREFIX}.{name.replace('layer.', 'layers.0.', 1)}"] = tensor
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        torch.save(plain(tensors, drafter.dtype), folder / FILE)

    def read(self, folder: Path, target: Target) -> Reader:
        return HydraCheckpoint(folder, target)

    def is_mine(self, folder: Path) -> bool:
        return "hydra_num_heads" in read_config(folder)

    def problems(self, folder: Path) -> list[str]:
        config = read_config(folder)
        keys = ("hydra_num_layers", "hydra_head_arch", "base_model_name_or_path")
        found = [f"config.json has no '{key}'" for key in keys if key not in config]
        if config.get("hydra_head_arch") not in ("mlp", "prefix-mlp"):
            return [
                *found,
                f"hydra_head_arch is {config.get('hydra_head_arch')}, which is not read",
            ]
        if not config.get("grounded_heads", False):
            found.append("grounded_heads is not true, so that the heads would read no drafts")
        if "hydra_num_layers" not in config or not (folder / FILE).is_file():
            return [*found, *([] if (folder / FILE).is_file() else [f"{FILE} is missing"])]
        tensors = load_tensors(folder)
        prefix = config["hydra_head_arch"] == "prefix-mlp"
        matrix = "hydra_lm_head.0.1.weight" if prefix else "hydra_lm_head.0.weight"
        if matrix not in tensors:
            return [*found, f"tensor '{matrix}' is missing"]
        vocab, d = tensors[matrix].shape
        expected = _expected(config, int(d), int(vocab))
        optional: dict[str, tuple[int, ...]] = {"input_embed_fn.weight": (vocab, d)}
        if prefix:
            optional |= {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(PREFIX)}
            if f"{PREFIX}.norm.weight" not in tensors:
                found.append(f"tensor '{PREFIX}.norm.weight' is missing")
        return found + tensor_problems(folder, expected, optional=optional)

    def load(self, folder: Path, target: Target) -> Drafter:
        config, tensors = read_config(folder), load_tensors(folder)
        prefix = config.get("hydra_head_arch") == "prefix-mlp"
        weights: dict[str, Tensor] = {}
        strays = []
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part == "hydra_mlp":
                i, j, inner = rest.split(".", 2)
                place = int(j) if prefix else 2 * int(j) + 1
                inner = inner.replace("res_connection.", "residual.")
                weights[f"blocks.{i}.{place}.{inner}"] = tensor
            elif part == "hydra_lm_head":
                i, _, kind = rest.partition(".")
                weights[f"heads.{i}.linear.{kind.removeprefix('1.')}"] = tensor
            elif part == PREFIX and not rest.startswith("embed_tokens."):
                weights[f"prefix.{rest.replace('layers.0.', 'layer.', 1)}"] = tensor
            elif part not in (PREFIX, "input_embed_fn"):
                strays.append(name)
        drafter = HydraHeads(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            target_shape=target.layer_shape,
            num_heads=int(config["hydra_num_heads"]),
            num_layers=int(config["hydra_num_layers"]),
            prefix_layer=prefix,
            head=OWN,
        )
        return fill(drafter, weights, strays, target)


def _num_layers(drafter: HydraHeads) -> int:
    return len(drafter.blocks[0]) // 2  # type: ignore[arg-type]


def _eps(target: Target) -> float:
    return float(getattr(target.config, "rms_norm_eps", None) or 1e-6)


def _rows(drafter: HydraHeads, depth: int) -> tuple[Tensor, Tensor]:
    """(U, b) of a depth over the whole vocabulary."""
    matrix = drafter.head(depth).matrix()
    assert matrix is not None
    rows_Dd, bias = matrix
    bias_D = torch.zeros_like(rows_Dd[:, 0]) if bias is None else bias
    ids_D = drafter.draft_ids_D
    if ids_D is None:
        return rows_Dd, bias_D
    wide_Vd = rows_Dd.new_zeros(drafter.vocab_size, rows_Dd.shape[1])
    bias_V = bias_D.new_full((drafter.vocab_size,), OUTSIDE)
    return wide_Vd.index_copy(0, ids_D, rows_Dd), bias_V.index_copy(0, ids_D, bias_D)


def _expected(config: dict[str, Any], d: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the heads."""
    prefix = config["hydra_head_arch"] == "prefix-mlp"
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(int(config["hydra_num_heads"])):
        for block in range(int(config["hydra_num_layers"])):
            base = f"hydra_mlp.{i}.{2 * block + 1 if prefix else block}"
            wide = d if block else (i + 2) * d
            parts = ("linear",) if block else ("linear", "res_connection")
            for part in parts:
                shapes |= {f"{base}.{part}.weight": (d, wide), f"{base}.{part}.bias": (d,)}
        matrix = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
        shapes |= {f"{matrix}.weight": (vocab, d), f"{matrix}.bias": (vocab,)}
    return shapes


class HydraCheckpoint:
    """A reader of the file in a few lines of torch."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.config, self.target = read_config(folder), target
        self.tensors = {n: t.to(target.device).float() for n, t in load_tensors(folder).items()}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _context(self, features: Features) -> Tensor:
        """f_t, or with the prefix layer its output there."""
        final_Td = features.final_BTd[0].float()
        if self.config["hydra_head_arch"] == "mlp":
            return final_Td[-1]
        base = f"{PREFIX}.layers.0"
        layer = CheckpointLayer(self.tensors, base, self.target.plain_config)
        normed_Td = layer.norm(f"{base}.input_layernorm.weight", final_Td)
        return layer.norm(f"{PREFIX}.norm.weight", layer(normed_Td, final_Td))[-1]

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Head i reads the context and the embeddings of x_{T-1} and of the drafts before it."""
        prefix = self.config["hydra_head_arch"] == "prefix-mlp"
        path = [self._context(features), self.target.embed(tokens_1T[0, -1]).float()]
        drafted = []
        for i in range(self.config["hydra_num_heads"]):
            z = torch.cat(path)
            for block in range(self.config["hydra_num_layers"]):
                base = f"hydra_mlp.{i}.{2 * block + 1 if prefix else block}"
                skip = z if block else self._linear(f"{base}.res_connection", z)
                z = skip + F.silu(self._linear(f"{base}.linear", z))
            matrix = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
            drafted.append(int(self._linear(matrix, z).argmax()))
            path.append(self.target.embed(tokens_1T.new_tensor(drafted[-1])).float())
        return drafted
