"""MLP speculators under IBM's names, which TGI reads too.

    speculator.emb.{k}.weight     [V, D]      E_k
    speculator.proj.{k}.weight    [D, d] or [D, D]   P_k
    speculator.ln.{k}.weight, .bias   [D]     norm_k
    speculator.head.{k}.weight    [V, D]      U_k over the whole vocabulary

With `tie_weights` there is one E, U and norm, and P_0 and P_1. Readers compute s P x + c E with
c = sqrt((1 - s^2) D / 2), s times what our family does, and a norm follows: the same but for the
norm's epsilon. Rows outside a reduced draft vocabulary are the mean of the rows inside, as in
medusa.py.

Shape legend: d hidden size of the target, D inner width, V target vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.base import Reader
from export.formats.base import Format, floats, head_complaint, head_rows, read_config, write_files
from export.formats.importing import fill
from export.formats.medusa import widen_by_mean
from export.tensors import load_tensors, tensor_problems
from models.drafter.base import Drafter
from models.drafter.mlp_speculator import EPS, MlpSpeculator
from models.head.tied import TiedHead
from models.target import Features, Target

OWN = {"_target_": "models.head.own.OwnHead"}
KEYS = ("inner_dim", "n_predict", "emb_dim", "vocab_size", "tie_weights", "scale_input")


class MlpSpeculatorFormat(Format):
    """The folder."""

    name = "mlp_speculator"
    families = (MlpSpeculator,)
    all_depths = True

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, MlpSpeculator)
        if len(drafter.embeddings) < drafter.n_predict and drafter.n_predict < 2:
            return "An MLP speculator of one step has no second projection, which readers load."
        return None if isinstance(drafter.head(0), TiedHead) else head_complaint(drafter)

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, MlpSpeculator)
        steps, own = drafter.n_predict, len(drafter.embeddings)
        config = {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            "emb_dim": drafter.hidden_size,
            "inner_dim": drafter.width,
            "n_predict": steps,
            "n_candidates": 5,
            "top_k_tokens_per_head": [max(1, 4 - k) for k in range(steps)],
            "vocab_size": drafter.vocab_size,
            "tie_weights": own < steps,
            "scale_input": drafter.scale_input,
            "base_model_name_or_path": drafter.target.name,
            "torch_dtype": str(drafter.dtype).removeprefix("torch."),
        }
        tensors: dict[str, Tensor] = {}
        for part, modules in (
            ("emb", drafter.embeddings),
            ("proj", drafter.projections),
            ("ln", drafter.norms),
        ):
            for k, module in enumerate(modules):
                for name, tensor in module.state_dict().items():
                    tensors[f"speculator.{part}.{k}.{name}"] = tensor
        for k in range(own):
            rows = _rows(drafter, k)
            wide = widen_by_mean(rows, drafter.draft_ids_D, drafter.vocab_size)
            tensors[f"speculator.head.{k}.weight"] = wide
        write_files(folder, config, tensors, drafter.dtype)

    def read(self, folder: Path, target: Target) -> Reader:
        return MlpSpeculatorCheckpoint(folder, target.device)

    def is_mine(self, folder: Path) -> bool:
        return read_config(folder).get("model_type") == "mlp_speculator"

    def problems(self, folder: Path) -> list[str]:
        config = read_config(folder)
        absent = [f"config.json has no '{key}'" for key in KEYS if key not in config]
        if absent:
            return absent
        d, width, vocab = (int(config[k]) for k in ("emb_dim", "inner_dim", "vocab_size"))
        steps = int(config["n_predict"])
        own = 1 if config["tie_weights"] else steps
        expected: dict[str, tuple[int, ...]] = {}
        for k in range(own):
            expected |= {
                f"speculator.emb.{k}.weight": (vocab, width),
                f"speculator.head.{k}.weight": (vocab, width),
                f"speculator.ln.{k}.weight": (width,),
                f"speculator.ln.{k}.bias": (width,),
            }
        for k in range(2 if config["tie_weights"] else steps):
            expected[f"speculator.proj.{k}.weight"] = (width, width if k else d)
        return tensor_problems(folder, expected)

    def load(self, folder: Path, target: Target) -> Drafter:
        config, weights = read_config(folder), {}
        parts = {"emb": "embeddings", "proj": "projections", "ln": "norms"}
        strays = []
        for name, tensor in load_tensors(folder).items():
            part, _, rest = name.removeprefix("speculator.").partition(".")
            if part == "head":
                weights[f"heads.{rest.replace('.', '.linear.', 1)}"] = tensor
            elif part in parts:
                weights[f"{parts[part]}.{rest}"] = tensor
            else:
                strays.append(name)
        drafter = MlpSpeculator(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            n_predict=int(config["n_predict"]),
            inner_dim=int(config["inner_dim"]),
            tie_weights=bool(config.get("tie_weights", False)),
            scale_input=bool(config.get("scale_input", False)),
            head=OWN,
        )
        return fill(drafter, weights, strays, target)


def _rows(drafter: MlpSpeculator, k: int) -> Tensor:
    """U_k; a tied head's are rows of the embedding."""
    if not isinstance(drafter.head(k), TiedHead):
        return head_rows(drafter, k)
    weight: Tensor = drafter.embeddings[k].weight  # type: ignore[assignment]
    return weight if drafter.draft_ids_D is None else weight[drafter.draft_ids_D]


class MlpSpeculatorCheckpoint:
    """A reader of the folder in a few lines of torch, as IBM's code and TGI compute it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.config: dict[str, Any] = read_config(folder)
        self.tensors = floats(folder, device)

    def _tensor(self, part: str, step: int, name: str = "weight") -> Tensor:
        if self.config["tie_weights"]:
            step = min(step, 1) if part == "proj" else 0
        return self.tensors[f"speculator.{part}.{step}.{name}"]

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """From f_t (t = T-2) and x_{T-1}; each draft is read by the next step."""
        steps, width = int(self.config["n_predict"]), int(self.config["inner_dim"])
        share = 0.5 ** (0.5 / steps)
        scale = ((1 - share**2) * (width / 2)) ** 0.5
        state = features.final_BTd[0, -1].float()
        if self.config["scale_input"]:
            state = F.rms_norm(state, state.shape, None, EPS) / 2**0.5
        drafted: list[int] = []
        token = int(tokens_1T[0, -1])
        for k in range(steps):
            mixed = share * (self._tensor("proj", k) @ state)
            mixed = mixed + scale * self._tensor("emb", k)[token]
            normed = F.rms_norm(mixed, mixed.shape, self._tensor("ln", k), EPS)
            state = F.gelu(normed + self._tensor("ln", k, "bias"))
            token = int((self._tensor("head", k) @ state).argmax())
            drafted.append(token)
        return drafted
