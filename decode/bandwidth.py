"""Weight bytes read by the target and by a draft: what decoding costs when memory is the limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from models.drafter.base import Drafter
from models.head import Head
from models.split import FirstLayers
from models.target import Target


def target_bytes(target: Target) -> int:
    """Weight bytes one target forward reads.

    Every parameter once; an embedding table of its own is left out, because a lookup reads only the
    rows it needs. A table tied to the vocabulary head is read as the head.
    """
    total = sum(p.numel() * p.element_size() for p in target.model.parameters())
    embedding = target.embedding_weight_Vd
    if embedding.data_ptr() != target.head_weight_Vd.data_ptr():
        total -= embedding.numel() * embedding.element_size()
    return total


class ByteCounter:
    """The weight bytes read so far."""

    def __init__(self) -> None:
        self.read = 0


@contextmanager
def count_reads(drafter: Drafter) -> Iterator[ByteCounter]:
    """Count weight bytes while the drafter runs: each call of a module reads its own parameters.

    Counting calls instead of parameters is right for every family: a head that is used once a draft
    counts once, a layer that is unrolled seven times counts seven times, and a frozen head, which
    has no parameters, counts the rows of the target's matrix it multiplies with.

    An acceptance head counts where a rule asks it. Layers of the target that a drafter runs itself
    (models/split.py) count each time it runs them. A target forward stays whole beside it, because
    verification runs those layers as well, for the leaves of the draft (every draft has some), and
    the others for all nodes.
    """
    counter = ByteCounter()

    def add(module: nn.Module, _: Any) -> None:
        counter.read += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        if isinstance(module, Head) and not any(True for _ in module.parameters()):
            element = next(drafter.parameters()).element_size()
            counter.read += module.vocab_size * module.hidden_size * element
        if isinstance(module, FirstLayers):
            counter.read += module.weight_bytes

    head = drafter.acceptance
    modules = [*drafter.modules(), *(head.modules() if head is not None else [])]
    hooks = [module.register_forward_pre_hook(add) for module in modules]
    try:
        yield counter
    finally:
        for hook in hooks:
            hook.remove()
