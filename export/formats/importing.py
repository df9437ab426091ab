"""What importers of published checkpoints share."""

import torch
from torch import Tensor

from models.drafter.base import Drafter
from models.target import Target


def fill(
    drafter: Drafter, weights: dict[str, Tensor], strays: list[str], target: Target
) -> Drafter:
    """`drafter` with exactly these weights, bound. `strays` are tensors without a place.

    Raises ValueError where names or shapes do not fit.
    """
    own = {k: v for k, v in drafter.state_dict().items() if k != "draft_ids_D"}
    missing = sorted(own.keys() - weights.keys())
    strays = sorted(strays) + sorted(weights.keys() - own.keys())
    bent = [
        f"{name} {list(weights[name].shape)} in place of {list(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if missing or strays or bent:
        wrong = [f"missing {', '.join(missing)}"] if missing else []
        wrong += [f"without a place here {', '.join(strays)}"] if strays else []
        wrong += [f"of another shape {', '.join(bent)}"] if bent else []
        raise ValueError(
            f"The checkpoint does not fit {type(drafter).__name__} for the target "
            f"'{target.name}': {'; '.join(wrong)}. Check that the target is the one it was trained "
            "for (target.name=...), and that it is a whole checkpoint of this family."
        )
    drafter = drafter.to(dtype_of(weights))
    drafter.load_state_dict(weights, strict=False)
    return drafter.to(target.device).bind(target).eval()


def dtype_of(weights: dict[str, Tensor]) -> torch.dtype:
    """The precision of the checkpoint's floats."""
    return next(t.dtype for t in weights.values() if t.is_floating_point())


def insist_embedding(stored_Vd: Tensor | None, target: Target) -> None:
    """The checkpoint's copy of the target's embedding must be the target's."""
    if stored_Vd is None:
        return
    own_Vd = target.embedding_weight_Vd
    rows = min(len(stored_Vd), len(own_Vd))
    same = stored_Vd.shape[1:] == own_Vd.shape[1:] and torch.allclose(
        stored_Vd[:rows].float().cpu(), own_Vd[:rows].float().cpu(), rtol=1e-2, atol=1e-3
    )
    if not same:
        raise ValueError(
            f"The checkpoint brings a token embedding {list(stored_Vd.shape)} that is not the one "
            f"of '{target.name}' {list(own_Vd.shape)}, expected the target's own, which our "
            "drafters read; it was trained for another target, or trained its embedding too. Give "
            "the target it belongs to with target.name=."
        )
