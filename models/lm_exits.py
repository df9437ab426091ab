"""A language model that can stop after some of its layers: its pieces, and their cache.

Shape legend: T positions, N rows of a frontier, R rows to be read by a piece, d width, D draft
vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from models.cache import GrowingCache, GrowingLayer, causal_rows
from models.head import Head
from models.lm_shape import layer_list, with_layers
from models.lm_state import Memory, additive, has_window
from models.target import Target, plain_config


def pieces(inner: Any, exits: Sequence[int]) -> list[Any]:
    """Views of `inner` that each run the layers between two exits, without the final norm.

    A view shares every module; it is fed with the hidden state of the view before.
    """
    name, layers = layer_list(inner)
    if "." in name or not isinstance(getattr(inner, "norm", None), nn.Module):
        raise ValueError(
            f"The layers and the final norm of {type(inner).__name__} are not where they are "
            "expected (layers, norm), so it cannot stop in between; use drafter=causal_lm."
        )
    found = []
    for first, last in zip([0, *exits[:-1]], exits, strict=True):
        settings = with_layers(plain_config(inner.config), range(first, last))
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config._attn_implementation = inner.config._attn_implementation
        view = copy.copy(inner)
        view.__dict__["_modules"] = dict(inner._modules)
        setattr(view, name, nn.ModuleList(layers[first:last]))
        view.norm = nn.Identity()
        view.config = config
        found.append(view)
    return found


class ExitCache(GrowingCache):
    """Keys and values where deeper pieces may be behind: a token that left early has none there.

    Row r belongs to the same token in every layer; piece s holds rows 0..rows(s)-1. What piece s
    has not read yet waits in `waiting[s]`: the hidden states of rows rows(s)..rows(s-1)-1.
    """

    def __init__(self, exits: Sequence[int]) -> None:
        super().__init__()
        self.first = [0, *exits[:-1]]
        self.waiting: list[Tensor | None] = [None for _ in exits]

    def rows(self, piece: int) -> int:
        """Rows that a piece has read."""
        if self.first[piece] >= len(self.layers):
            return 0
        layer = self.layers[self.first[piece]]
        assert isinstance(layer, GrowingLayer)
        return layer.get_seq_length()

    def shorten(self, length: int) -> None:
        for s in range(1, len(self.first)):
            waiting = self.waiting[s]
            if waiting is not None:
                self.waiting[s] = waiting[:, : max(0, length - self.rows(s))]
        super().shorten(length)

    def keep(self, start: int, positions_N: Tensor) -> None:
        for s in range(1, len(self.first)):
            waiting, read = self.waiting[s], self.rows(s)
            if waiting is not None:
                end = read + waiting.shape[1]
                before = torch.arange(read, max(read, min(start, end)), device=positions_N.device)
                after = positions_N[(positions_N >= read) & (positions_N < end)]
                self.waiting[s] = waiting[:, torch.cat([before, after]) - read]
        for layer in self.layers:
            assert isinstance(layer, GrowingLayer)
            length = layer.get_seq_length()
            if length > start:
                layer.keep(start, positions_N[positions_N < length])


def run_piece(
    view: Any, piece: int, flow_1Rd: Tensor, memory: Memory, dtype: torch.dtype
) -> Tensor:
    """Read with one piece what waits for it and the rows that just came: `[1, R, d]` -> the same
    with the waiting rows in front."""
    cache = memory.cache
    assert isinstance(cache, ExitCache)
    waiting = cache.waiting[piece]
    if waiting is not None:
        flow_1Rd = torch.cat([waiting, flow_1Rd], dim=1)
        cache.waiting[piece] = None
    first, device = cache.rows(piece), flow_1Rd.device
    at_R = memory.positions(first, device)
    new = flow_1Rd.shape[1]
    mask = None
    chain = all(given is None for given in memory.parents)
    plain = new == 1 and chain and not has_window(view.config)
    if not plain or view.config._attn_implementation != "sdpa":
        visible_RK = causal_rows(new, first, device)[0, 0]
        if not chain:
            _hide_other_branches(visible_RK, memory)
        mask = additive(visible_RK, at_R, memory.positions(0, device), view.config, dtype)
    return view(
        inputs_embeds=flow_1Rd,
        attention_mask=mask,
        position_ids=at_R[None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def _hide_other_branches(visible_RK: Tensor, memory: Memory) -> None:
    """Of the drafted nodes, each row sees its ancestors and itself."""
    ancestors: list[list[bool]] = []
    for node, parent in enumerate(memory.node_parents):
        row = ancestors[parent].copy() if parent >= 0 else [False] * memory.count
        row[node] = True
        ancestors.append(row)
    # The last rows are nodes, unless verified tokens are among them.
    rows = min(memory.count, visible_RK.shape[0])
    seen_MM = torch.tensor(ancestors, device=visible_RK.device)
    visible_RK[-rows:, memory.start :] = seen_MM[-rows:]


class RecalledHead(Head):
    """A head that gives back the logits it made to decide on an exit, instead of making them
    again."""

    def __init__(self, head: Head) -> None:
        super().__init__(hidden_size=head.hidden_size, vocab_size=head.vocab_size)
        self.inner = head
        self._known: tuple[Tensor, Tensor] | None = None

    def know(self, states_Nd: Tensor, logits_ND: Tensor) -> None:
        """These are the logits of these states (of this very tensor)."""
        self._known = states_Nd, logits_ND

    def forward(self, states: Tensor) -> Tensor:
        if self._known is not None and self._known[0] is states:
            return self._known[1]
        return self.inner(states)

    def bind(self, target: Target, draft_ids_D: Tensor | None) -> None:
        self._known = None
        self.inner.bind(target, draft_ids_D)
