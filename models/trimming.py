"""A finished drafter with a smaller draft vocabulary (VocabTrim, arXiv 2506.22694): no training.

Shape legend: D draft vocabulary before, M after, d hidden size.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.drafter.base import Drafter
from models.drafter.load import drafter_class
from models.head import Head


def trimmed(folder: Path, drafter: Drafter, ids_M: Tensor) -> Drafter:
    """The drafter saved in `folder` (and loaded as `drafter`), drafting only the ids `ids_M`.

    Only rows of vocabulary heads are left out: all states, and the logits of the ids that stay, are
    those of the drafter it was. `ids_M` are target ids, ascending, that it could draft before.

    Raises ValueError for heads whose logits are not one matrix times the states.
    """
    family, settings = drafter_class(folder)
    rows_M = rows_in(drafter, ids_M)
    by_rows = {
        f"{name}.{parameter}".lstrip(".")
        for name, module in drafter.named_modules()
        if isinstance(module, Head)
        for parameter in _vocabulary_parameters(module)
    }
    smaller = family(**settings | {"draft_vocab_size": len(ids_M)})
    weights = {
        name: tensor[rows_M] if name in by_rows else tensor
        for name, tensor in drafter.state_dict().items()
        if name != "draft_ids_D"
    }
    weights["draft_ids_D"] = ids_M
    _check_shapes(smaller, weights)
    smaller.load_state_dict(weights)
    return smaller.to(drafter.dtype).to(ids_M.device).bind(drafter.target).eval()


def rows_in(drafter: Drafter, ids_M: Tensor) -> Tensor:
    """Where target ids stand in a drafter's vocabulary, all of them being in it."""
    if drafter.draft_ids_D is None:
        return ids_M
    rows_M = torch.searchsorted(drafter.draft_ids_D, ids_M).clamp(max=len(drafter.draft_ids_D) - 1)
    assert torch.equal(drafter.draft_ids_D[rows_M], ids_M), "an id that could not be drafted before"
    return rows_M


def _vocabulary_parameters(head: Head) -> list[str]:
    """Names of a head's own parameters with one row for every draft token."""
    own = dict(head.named_parameters())
    parts = head.matrix()
    if own and parts is None:
        raise ValueError(
            f"A drafter with a {type(head).__name__} cannot be trimmed, because its vocabulary is "
            "not a matrix of its own; expected OwnHead, FrozenHead or LowRankHead. Train with a "
            "smaller drafter.draft_vocab_size instead."
        )
    return [name for name, p in own.items() if any(p is part for part in parts or ())]


def _check_shapes(drafter: Drafter, weights: dict[str, Tensor]) -> None:
    """Refuse a family that sizes something else by its vocabulary."""
    for name, tensor in drafter.state_dict().items():
        found = weights.get(name)
        if found is None or found.shape != tensor.shape:
            raise ValueError(
                f"{type(drafter).__name__} cannot be trimmed, because its '{name}' would change "
                "with the draft vocabulary and it is no row of a head; train with a smaller "
                "drafter.draft_vocab_size instead."
            )
