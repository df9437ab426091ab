"""The reduced draft vocabulary: which target ids may be drafted at all.

A token outside it can never be drafted, but the target still produces it, so decoding stays
lossless; with a small hidden size the vocabulary head is most of a drafter's cost.
"""

import torch
from torch import Tensor


def count_tokens(tokens: Tensor, learn: Tensor, vocab_size: int) -> Tensor:
    """How often each id is a token to learn, `[V]`."""
    return torch.bincount(tokens[learn.bool()].reshape(-1), minlength=vocab_size)


def choose_vocab(
    counts_V: Tensor, size: int, required: tuple[int, ...] = ()
) -> tuple[Tensor, float]:
    """The `size` most frequent ids (ascending) with the `required` ones (EOS) forced in.

    Returns the ids and their coverage: the share of counted tokens that lie inside. Ties are broken
    by the lower id, so that the choice does not depend on the machine.
    """
    vocab_size = counts_V.shape[0]
    if not 0 < size <= vocab_size:
        raise ValueError(
            f"A draft vocabulary of {size} was asked for; the target has {vocab_size} tokens. Give "
            "a number between 1 and that, or null for the whole vocabulary."
        )
    priority = counts_V.clone().double()
    priority[list(required)] = float("inf")
    order = torch.sort(priority, descending=True, stable=True).indices
    ids_D = order[:size].sort().values
    total = int(counts_V.sum())
    coverage = float(counts_V[ids_D].sum()) / total if total else 1.0
    return ids_D, coverage
