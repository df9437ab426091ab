"""What a language model remembers while it drafts: the keys and values of verified tokens and of
the nodes of the draft in progress.

Shape legend: N nodes of a frontier, M nodes drafted so far, P verified tokens not read yet.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.cache import GrowingCache
from models.drafter.base import Frontier


@dataclass
class Memory:
    """Cache rows 0..`length`-1 belong to verified tokens; `unread` are the verified tokens behind
    them, ending with the root of the next draft.

    While drafting, the rows from `start` on belong to the draft's nodes in the order in which they
    were read (node 0 is the root); what was unread before the root stands between. Nodes are only
    added, so that every state of the draft stays valid until the next draft begins.
    """

    cache: GrowingCache = field(default_factory=GrowingCache)
    length: int = 0
    unread: list[int] = field(default_factory=list)
    start: int = 0
    tokens: list[Tensor] = field(default_factory=list)
    parents: list[Tensor | None] = field(default_factory=list)
    """Of each frontier; None for the node right after the one before it (a chain)."""
    depths: list[int] = field(default_factory=list)
    """Of each node."""

    @property
    def count(self) -> int:
        """Nodes drafted so far."""
        return len(self.depths)

    def positions(self, first: int, device: torch.device) -> Tensor:
        """Positions of the cache rows from `first` on: a node stands right behind its parent."""
        verified = torch.arange(first, max(first, self.start), device=device)
        drafted = torch.tensor(self.depths[max(0, first - self.start) :], device=device)
        return torch.cat([verified, drafted.long() + self.start])

    @property
    def node_parents(self) -> list[int]:
        """The parent of each node; -1 for the root."""
        parents: list[int] = []
        for given in self.parents:
            parents += [len(parents) - 1] if given is None else given.tolist()
        return parents

    def begin(self) -> None:
        """Forget the draft before."""
        self.cache.shorten(self.length)
        self.start = self.length + len(self.unread) - 1
        self.tokens, self.parents, self.depths = [], [], []

    def note(self, tokens_N: Tensor, parents_N: Tensor | None, depth: int) -> None:
        """A frontier was read."""
        self.tokens.append(tokens_N)
        self.parents.append(parents_N)
        self.depths += [depth] * len(tokens_N)

    def advance(self, verified: list[int]) -> None:
        """New verified tokens x_{t-N+2}..x_{t+1}: keep the keys of those that were drafted.

        The last of them is the next root; what follows the drafted path stays unread.
        """
        path = self._path(verified[:-1])
        if not path:
            # No draft was made from the root known so far: it is verified, and still unread.
            self.cache.shorten(self.length)
            self.unread += verified
        else:
            if path == list(range(len(path))):
                self.cache.shorten(self.start + len(path))
            else:
                rows_N = torch.tensor(path, device=self.tokens[0].device) + self.start
                self.cache.keep(self.start, rows_N)
            self.length = self.start + len(path)
            self.unread = verified[len(path) - 1 :]
        self.tokens, self.parents, self.depths = [], [], []

    def _path(self, verified: list[int]) -> list[int]:
        """Root and drafted nodes that spell `verified`, as far as they were drafted and read."""
        if not self.tokens or int(self.tokens[0][0]) != self.unread[-1]:
            return []
        tokens = torch.cat(self.tokens).tolist()
        parents = self.node_parents
        path = [0]
        for token in verified:
            found = (
                node
                for node in range(path[-1] + 1, len(tokens))
                if parents[node] == path[-1] and tokens[node] == token
            )
            node = next(found, None)
            if node is None:
                break
            path.append(node)
        return path


@dataclass(frozen=True)
class LmState:
    """A place in the draft: which node each row of the last frontier is, and what it sees.

    `visible_NM` marks the ancestors of each row, itself included. None: all nodes so far (a chain).
    """

    memory: Memory
    nodes_N: Tensor | None = None
    visible_NM: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """How the next frontier is read: the state after it, where its nodes stand, what they see."""

    state: LmState
    tokens_1N: Tensor
    positions_1N: Tensor
    visible: Tensor | None
    """`[N, start + M + N]`, None for plain causal reading."""


def plan_step(state: LmState, depth: int, frontier: Frontier) -> Step:
    """Enter a frontier into the memory. At depth 0 the unread tokens are read with the root."""
    memory, tokens_N = state.memory, frontier.tokens_N
    device = tokens_N.device
    if depth == 0:
        memory.begin()
        memory.note(tokens_N, None, 0)
        if len(memory.unread) > 1:
            before = torch.tensor(memory.unread[:-1], device=device)
            tokens_N = torch.cat([before, tokens_N])
        # The root stands at index `start`, what was unread right before it.
        positions_N = torch.arange(memory.length, memory.start + 1, device=device)
        return Step(LmState(memory), tokens_N[None], positions_N[None], None)
    position = memory.start + depth
    if len(tokens_N) == 1 and memory.count == depth:
        # One node at each depth so far: all of them are ancestors, as in plain decoding.
        memory.note(tokens_N, None, depth)
        positions_11 = torch.full((1, 1), position, device=device)
        return Step(LmState(memory), tokens_N[None], positions_11, None)
    count = memory.count
    nodes_N, visible_NM = _seen(state, depth, device)
    new = len(tokens_N)
    here_NM = torch.zeros(new, count + new, dtype=torch.bool, device=device)
    here_NM[:, : visible_NM.shape[1]] = visible_NM[frontier.parents_N]
    own_N = torch.arange(count, count + new, device=device)
    here_NM[:, count:] = torch.eye(new, dtype=torch.bool, device=device)
    memory.note(tokens_N, nodes_N[frontier.parents_N], depth)
    past = torch.ones(new, memory.start, dtype=torch.bool, device=device)
    return Step(
        LmState(memory, own_N, here_NM),
        tokens_N[None],
        torch.full((1, new), position, device=device),
        torch.cat([past, here_NM], dim=1),
    )


def _seen(state: LmState, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(nodes_N, visible_NM)` of the frontier before depth `depth`, also where a chain led there:
    its node is number depth - 1 and sees all before it."""
    if state.nodes_N is not None and state.visible_NM is not None:
        return state.nodes_N, state.visible_NM
    node_1 = torch.full((1,), depth - 1, device=device)
    return node_1, torch.ones(1, depth, dtype=torch.bool, device=device)


def additive(
    visible_QK: Tensor, at_Q: Tensor, at_K: Tensor, config: Any, dtype: torch.dtype
) -> Any:
    """A mask as transformers takes it: 0 where visible, -inf elsewhere, added to the scores before
    the softmax. `at_Q` and `at_K` are the positions of queries and keys.

    Where layers only look `sliding_window` positions back, theirs is cut accordingly.
    """
    everything = _to_additive(visible_QK, dtype)
    if not has_window(config):
        return everything
    near = visible_QK & (at_Q[:, None] - at_K[None] < config.sliding_window)
    kinds = getattr(config, "layer_types", None)
    near = _to_additive(near, dtype)
    return near if kinds is None else {"full_attention": everything, "sliding_attention": near}


def has_window(config: Any) -> bool:
    """Whether some layers look back a limited number of positions."""
    kinds = getattr(config, "layer_types", None)
    limited = kinds is None or "sliding_attention" in kinds
    return limited and getattr(config, "sliding_window", None) is not None


def _to_additive(visible_QK: Tensor, dtype: torch.dtype) -> Tensor:
    mask_QK = torch.zeros(visible_QK.shape, dtype=dtype, device=visible_QK.device)
    return mask_QK.masked_fill_(~visible_QK, float("-inf"))[None, None]
