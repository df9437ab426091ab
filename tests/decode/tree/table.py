"""A drafter that reads its q from a table, for comparing trees with other ways to grow them.

Shape legend: N frontier nodes, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from models.drafter.base import Depth, Drafter, Frontier, Policy, Tree
from models.head import Head
from models.target import Features

Path = tuple[int, ...]


class Same(Head):
    """Logits are the states."""

    def forward(self, states: Tensor) -> Tensor:
        return states


class Table(Drafter):
    """q after the drafted tokens `path` is `q[path]`: its logarithm is the state."""

    def __init__(self, q: Callable[[Path], Tensor], *, vocab: int, limit: int | None = None):
        super().__init__(hidden_size=vocab, vocab_size=vocab)
        self.q = q
        self.limit = limit
        self.same = Same(hidden_size=vocab, vocab_size=vocab)
        self.steps = 0
        self.rows = 0

    @property
    def num_depths(self) -> int:
        return 1

    @property
    def max_depth(self) -> int | None:
        return self.limit

    def head(self, depth: int) -> Head:
        return self.same

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        raise NotImplementedError

    def extend(self, state: Any, features: Features, tokens_1N: Tensor) -> Any:
        raise NotImplementedError

    def step(self, state: Any, depth: int, frontier: Frontier) -> tuple[Any, Tensor]:
        """The state is the path of every frontier node."""
        paths: list[Path] = [()]
        if depth > 0:
            tokens, parents = frontier.tokens_N.tolist(), frontier.parents_N.tolist()
            paths = [(*state[p], token) for token, p in zip(tokens, parents, strict=True)]
        self.steps += 1
        self.rows += len(paths)
        return paths, torch.stack([self.q(path).log() for path in paths])


def random_table(seed: int, vocab: int, sharpness: float = 1.5) -> Callable[[Path], Tensor]:
    """A random q after every path, made when it is first asked for."""
    known: dict[Path, Tensor] = {}

    def q(path: Path) -> Tensor:
        if path not in known:
            number = sum((token + 1) * (vocab + 1) ** i for i, token in enumerate(path))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            logits_V = torch.randn(vocab, generator=generator, dtype=torch.double) * sharpness
            known[path] = logits_V.softmax(-1).float()
        return known[path]

    return q


def grown(drafter: Drafter, policy: Policy, root: int = 0) -> Tree:
    """The tree a policy makes of a table drafter."""
    return drafter.propose(None, torch.tensor([root]), policy)


def paths_of(tree: Tree) -> list[Path]:
    """The drafted tokens on the path to every node; checks what every tree must be."""
    paths: list[Path] = [()]
    for node in range(1, len(tree)):
        parent = int(tree.parents_N[node])
        assert 0 <= parent < node
        assert int(tree.depths_N[node]) == int(tree.depths_N[parent]) + 1
        paths.append((*paths[parent], int(tree.tokens_N[node])))
    assert len(set(paths)) == len(paths), "siblings carry the same token"
    assert int(tree.parents_N[0]) == -1
    assert tree.depths_N.tolist() == sorted(tree.depths_N.tolist())
    return paths
