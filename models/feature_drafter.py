"""What drafters share that read the target's features once and then feed back their own.

    g^0_t = read(features_t)                               true features, verified positions
    y^k_t = layer(mix(E(x_{t+1+k}), g^k_t))                attends as models/levels.py says
    state, g^{k+1}_t = read_out(y^k_t)                     the state predicts x_{t+2+k}

A family is the three functions; unrolling and drafting are the same for all.

Shape legend: B sequences, T positions, N frontier nodes, M drafted nodes before them, S verified
positions, H query heads, G key and value heads, c head size, d hidden size, k depth.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.cache import GrowingCache, causal_rows
from models.computed import ComputedRows
from models.drafter.base import Depth, Drafter, Frontier
from models.feature_layer import FeatureLayer
from models.head import Head, build_head
from models.levels import Levels
from models.target import Features, Target

MOST_ROWS = 0.9
"""Share of rows to compute above which sorting them out is not worth it."""

MEASURED_DEPTHS = 5
"""Depths that validation measures at least: drafts get worse with every depth beyond training."""


class Verified:
    """Decoding, verified positions: rows attend causally to a cache that keeps them."""

    def __init__(self, cache: GrowingCache) -> None:
        self.cache = cache
        self.past = cache.get_seq_length()

    def update(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = self.cache.update(keys, values, 0)

    def attend(self, queries_BHTc: Tensor, scale: float) -> Tensor:
        new = queries_BHTc.shape[2]
        mask = causal_rows(new, self.past, queries_BHTc.device) if self.past and new > 1 else None
        return F.scaled_dot_product_attention(
            queries_BHTc,
            self.keys,
            self.values,
            attn_mask=mask,
            is_causal=new > 1 and mask is None,
            scale=scale,
            enable_gqa=True,
        )


@dataclass(frozen=True)
class Drafted:
    """Keys and values of the tree's nodes so far; which of them each frontier node descends from.

    A node's path is the diagonal of models/levels.py: its own states at levels 1..k.
    """

    keys_1GMc: Tensor
    values_1GMc: Tensor
    path_NM: Tensor


class Path:
    """Decoding, a frontier: node rows attend to the verified positions and to their own path."""

    def __init__(self, cache: GrowingCache, before: Drafted | None, parents_N: Tensor) -> None:
        layer: Any = cache.layers[0]
        self.verified: tuple[Tensor, Tensor] = (layer.keys, layer.values)
        self.before, self.parents_N = before, parents_N

    def update(self, keys: Tensor, values: Tensor) -> None:
        # Nodes are rows of one sequence.
        self_NN = torch.eye(len(self.parents_N), dtype=torch.bool, device=keys.device)
        if self.before is None:
            self.drafted = Drafted(keys, values, self_NN)
        else:
            self.drafted = Drafted(
                torch.cat([self.before.keys_1GMc, keys], dim=2),
                torch.cat([self.before.values_1GMc, values], dim=2),
                torch.cat([self.before.path_NM[self.parents_N], self_NN], dim=1),
            )

    def attend(self, queries_1HNc: Tensor, scale: float) -> Tensor:
        past = self.verified[0].shape[2]
        return F.scaled_dot_product_attention(
            queries_1HNc,
            torch.cat([self.verified[0], self.drafted.keys_1GMc], dim=2),
            torch.cat([self.verified[1], self.drafted.values_1GMc], dim=2),
            attn_mask=F.pad(self.drafted.path_NM, (past, 0), value=True),
            scale=scale,
            enable_gqa=True,
        )


@dataclass(frozen=True)
class FeatureState:
    """What drafting remembers.

    The layer's cache over verified positions 0..t (the one thing that `extend` changes in place);
    the state of position t, which predicts x_{t+2}; what the last frontier's nodes feed back, and
    their keys and values.
    """

    cache: GrowingCache
    states_1d: Tensor | None = None
    given_Nd: Tensor | None = None
    drafted: Drafted | None = None


def _computed(
    taught_BT: Tensor | None, depths: int
) -> tuple[ComputedRows | None, ComputedRows | None]:
    """Rows of level 0, and of all later ones; None and None where that is about every row.

    Of the last levels a few rows less at the end of every answer would do, which is not worth lists
    of their own.
    """
    if taught_BT is None:
        return None, None
    first = ComputedRows.of(taught_BT, range(1, 1 + depths))
    if first.share > MOST_ROWS:
        return None, None
    return first, ComputedRows.of(taught_BT, range(2, 1 + depths))


class FeatureDrafter(Drafter):
    """Base of the families above; `steps` depths are trained, any number is drafted.

    `detached` stops gradients between the depths.
    """

    detached = False
    predicts_features = True
    """Whether what is fed back is a prediction of the target's next feature f_{t+1+k}."""

    layer: FeatureLayer

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        draft_vocab_size: int | None,
        head: dict[str, Any],
        steps: int = 1,
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        self.steps = steps
        if steps < 1:
            raise ValueError(
                f"drafter.steps={steps} must be at least 1: it is the number of drafts in a row "
                "that training unrolls."
            )
        self.lm_head = build_head(
            head, hidden_size=hidden_size, vocab_size=draft_vocab_size or vocab_size
        )

    # --- what a family says -------------------------------------------------------------------

    @abstractmethod
    def read(self, features: Features) -> Tensor:
        """g^0: what the layer reads of the target's true features, `[..., d]`."""

    @abstractmethod
    def mix(self, embedded: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """(z, r), the layer's input and residual, of a token's embedding and a feature."""

    @abstractmethod
    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(state, g) of the layer's output: what the head reads, and what is fed back."""

    # --- shared -------------------------------------------------------------------------------

    @property
    def num_depths(self) -> int:
        return self.steps

    @property
    def max_depth(self) -> None:
        return None

    @property
    def measured_depths(self) -> int:
        return max(self.steps, MEASURED_DEPTHS)

    def head(self, depth: int) -> Head:
        return self.lm_head

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        self.lm_head.init_from(target, self.draft_ids_D)

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        return self.unroll_to(features, tokens_BT, self.num_depths)

    def unroll_to(self, features: Features, tokens_BT: Tensor, depths: int) -> Iterator[Depth]:
        return self.unroll_taught(features, tokens_BT, depths, None)

    def unroll_taught(
        self, features: Features, tokens_BT: Tensor, depths: int, taught_BT: Tensor | None
    ) -> Iterator[Depth]:
        """Level 0 makes keys and values of every position; all else is done for the rows whose
        state at this or a later depth is taught."""
        first, later = _computed(taught_BT, depths)
        embedded_BTd = self.embed(tokens_BT)
        given = self.read(features)
        T = tokens_BT.shape[1]
        positions = torch.arange(T, device=tokens_BT.device)[None]
        levels = Levels()
        for k in range(depths):
            # x_{t+1+k} stands at index t; the last 1+k positions read zeros and have no label.
            ahead = F.pad(embedded_BTd[:, 1 + k :], (0, 0, 0, min(1 + k, T)))
            rows = levels.rows = first if k == 0 else later
            if later is not None and first is not None and k > 0:
                ahead, positions = later.take(ahead), later.positions_1N
                given = later.within(first).take(given) if k == 1 else given
            mixed = self.mix(ahead, given)
            out = self.layer(*mixed, positions + k, levels, first if k == 0 else None)
            states, given = self.read_out(out)
            whole, predicted = (x if rows is None else rows.put(x) for x in (states, given))
            feature_BTd = predicted if self.predicts_features else None
            yield Depth(whole, self.lm_head, shift=1 + k, feature_BNd=feature_BTd)
            if self.detached:
                given = given.detach()

    def initial_state(self) -> FeatureState:
        return FeatureState(GrowingCache())

    def extend(self, state: FeatureState, features: Features, tokens_1N: Tensor) -> FeatureState:
        """Row t reads f_t and x_{t+1}: the last one has already read the root of the next draft."""
        past = state.cache.get_seq_length()
        positions_1N = torch.arange(past, past + tokens_1N.shape[1], device=tokens_1N.device)[None]
        z, residual = self.mix(self.embed(tokens_1N), self.read(features))
        out = self.layer(z, residual, positions_1N, Verified(state.cache))
        states_1d, given_1d = self.read_out(out[:, -1])
        return FeatureState(state.cache, states_1d, given_1d)

    def step(
        self, state: FeatureState, depth: int, frontier: Frontier
    ) -> tuple[FeatureState, Tensor]:
        assert state.states_1d is not None and state.given_Nd is not None, "extend comes first"
        if depth == 0:
            return state, state.states_1d
        # Node rows stand at t + depth, with t the last verified position.
        t = state.cache.get_seq_length() - 1
        positions_1N = torch.full_like(frontier.tokens_N, t + depth)[None]
        given_Nd = state.given_Nd[frontier.parents_N]
        path = Path(state.cache, state.drafted, frontier.parents_N)
        z, residual = self.mix(self.embed(frontier.tokens_N), given_Nd)
        out = self.layer(z[None], residual[None], positions_1N, path)[0]
        states_Nd, given_Nd = self.read_out(out)
        return replace(state, given_Nd=given_Nd, drafted=path.drafted), states_Nd
