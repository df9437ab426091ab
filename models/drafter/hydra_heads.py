"""Hydra and Hydra++ heads (Ankner et al., 2024, arXiv 2402.05109).

Shape legend: B sequences, T positions, N tree nodes, k depth, d hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.cache import GrowingCache
from models.computed import ComputedRows, at_rows
from models.drafter.base import Depth, Drafter, Frontier
from models.drafter.blocks import CausalLayer, ResidualBlock
from models.head import Head, build_head
from models.target import Features, Target


@dataclass(frozen=True)
class HydraState:
    """What drafting remembers: the context vector of the last verified position, the prefix
    layer's cache over verified positions, and the embeddings on each frontier node's path."""

    context_1d: Tensor | None = None
    cache: GrowingCache | None = None
    path_Nkd: Tensor | None = None


class HydraHeads(Drafter):
    """K heads that also read the tokens drafted before them.

        z_k = [c_t; E(x_{t+1}); ...; E(x_{t+1+k})]
        y_k = blocks_k(z_k),  first block (k+2)d -> d,  then `num_layers` - 1 residual blocks
        logits_k = U_k y_k  predicts x_{t+2+k}

    c_t = f_t for Hydra; with `prefix_layer` (Hydra++) c_t = norm(decoder layer(f_{<=t})), one
    causal decoder layer over the feature sequence. Hydra++ is prefix_layer, num_layers=4 and the
    teacher loss. Deviations from the released code: repeated blocks and dropouts are separate
    modules (there they are one shared object); the target's embedding is read, not stored.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_shape: dict[str, Any],
        num_heads: int = 4,
        num_layers: int = 1,
        prefix_layer: bool = False,
        dropout: float = 0.0,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        self.prefix = CausalLayer(hidden_size=hidden_size, **target_shape) if prefix_layer else None
        self.blocks = nn.ModuleList()
        for k in range(num_heads):
            layers: list[nn.Module] = [ResidualBlock(hidden_size=hidden_size, num_inputs=k + 2)]
            for _ in range(num_layers - 1):
                layers += [nn.Dropout(dropout), ResidualBlock(hidden_size=hidden_size)]
            self.blocks.append(nn.Sequential(nn.Dropout(dropout), *layers))
        size = draft_vocab_size or vocab_size
        self.heads = nn.ModuleList(
            build_head(head, hidden_size=hidden_size, vocab_size=size) for _ in range(num_heads)
        )

    @property
    def num_depths(self) -> int:
        return len(self.blocks)

    @property
    def reads_history(self) -> bool:
        return self.prefix is not None

    def head(self, depth: int) -> Head:
        return self.heads[depth]  # type: ignore[return-value]

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        for depth in range(self.num_depths):
            self.head(depth).init_from(target, self.draft_ids_D)

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        return self.unroll_taught(features, tokens_BT, self.num_depths, None)

    def unroll_taught(
        self, features: Features, tokens_BT: Tensor, depths: int, taught_BT: Tensor | None
    ) -> Iterator[Depth]:
        """The prefix layer runs at every position, a head at those that it is taught at."""
        context_BTd = features.final_BTd
        if self.prefix is not None:
            context_BTd = self.prefix(context_BTd)
        embedded_BTd = self.embed(tokens_BT)
        parts = [context_BTd]
        for k, block in enumerate(self.blocks):
            # E(x_{t+1+k}) stands at index t; the last 1+k positions read zeros and have no label.
            ahead_BTd = torch.zeros_like(embedded_BTd)
            ahead_BTd[:, : -(1 + k)] = embedded_BTd[:, 1 + k :]
            parts.append(ahead_BTd)
            rows = None if taught_BT is None else ComputedRows.of(taught_BT, [1 + k])
            states_BTd = at_rows(rows, lambda *z, of=block: of(torch.cat(z, dim=-1)), *parts)
            yield Depth(states_BTd, self.head(k), shift=1 + k)

    def initial_state(self) -> HydraState:
        return HydraState(cache=GrowingCache() if self.prefix is not None else None)

    def extend(self, state: HydraState, features: Features, tokens_1N: Tensor) -> HydraState:
        context_1Nd = features.final_BTd
        if self.prefix is not None:
            context_1Nd = self.prefix(context_1Nd, state.cache)
        return HydraState(context_1d=context_1Nd[:, -1], cache=state.cache)

    def step(self, state: HydraState, depth: int, frontier: Frontier) -> tuple[HydraState, Tensor]:
        assert state.context_1d is not None, "extend or start comes before step"
        path_N1d = self.embed(frontier.tokens_N)[:, None]
        if state.path_Nkd is not None:
            path_N1d = torch.cat([state.path_Nkd[frontier.parents_N], path_N1d], dim=1)
        context_Nd = state.context_1d.expand(len(path_N1d), -1)
        z_N = torch.cat([context_Nd, path_N1d.flatten(1)], dim=-1)
        grown = HydraState(state.context_1d, state.cache, path_N1d)
        return grown, self.blocks[depth](z_N)
