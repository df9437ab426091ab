"""How large a target's features are, for drafters whose first weights should not depend on it.

Inner streams of one target differ a hundredfold in size, embeddings and final features tenfold, and
rows of a vocabulary head that were trained for large features make any random state a confident
guess. A drafter that starts there spends its first steps on undoing it.

Shape legend: T positions, D draft vocabulary, d hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.target import Target

TEXTS, TOKENS = 8, 256
"""Calibration texts that are looked at, and tokens of each."""


@dataclass(frozen=True)
class Sizes:
    """Root mean squares over d: the median position's. (A first token's stream can be 50 times the
    others'.)"""

    embedding: float
    final: float
    layers: dict[int, float]


@torch.no_grad()
def typical_sizes(
    target: Target, calibration: Sequence[Tensor], layers: tuple[int, ...] = ()
) -> Sizes:
    """Sizes of E(x), f and h^l on some texts."""
    found: dict[str | int, list[Tensor]] = {name: [] for name in ("embedding", "final", *layers)}
    for tokens_T in list(calibration)[:TEXTS]:
        tokens_1T = tokens_T[None, :TOKENS].to(target.device)
        features = target.forward(tokens_1T, layers=layers)
        found["embedding"].append(_rms(target.embed(tokens_1T)))
        found["final"].append(_rms(features.final_BTd))
        for layer in layers:
            found[layer].append(_rms(features.layers[layer]))
    median = {name: float(torch.cat(sizes).median()) for name, sizes in found.items()}
    return Sizes(median["embedding"], median["final"], {k: median[k] for k in layers})


def _rms(x_1Td: Tensor) -> Tensor:
    return x_1Td[0].float().square().mean(-1).sqrt()


@torch.no_grad()
def logit_spread(
    target: Target, draft_ids_D: Tensor | None, scale_d: Tensor | None = None
) -> float:
    """Standard deviation of the logits W (scale * u) over tokens, for random u of size 1."""
    weight = target.head_weight_Vd
    rows_Dd = (weight if draft_ids_D is None else weight[draft_ids_D.to(weight.device)]).float()
    if scale_d is not None:
        rows_Dd = rows_Dd * scale_d.float()
    return float(rows_Dd.square().sum(-1).mean().sqrt())
