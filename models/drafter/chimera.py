"""Chimera (Zeng et al., 2024, arXiv 2402.15758).

Shape legend: B sequences, T positions, N rows or tree nodes, H query heads, G key and value heads,
c head size, k depth, d hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from models.cache import GrowingCache
from models.computed import ComputedRows, at_rows
from models.drafter.base import Depth, Drafter, Frontier
from models.drafter.blocks import AttentionInParts, ResidualBlock, Rotary, layer_config
from models.feature_drafter import Drafted, Path
from models.head import Head, build_head
from models.target import Features, Target


class ContextEncoder(nn.Module):
    """A Llama decoder layer in two parts: what a row offers to be read, and what a row reads."""

    def __init__(self, *, hidden_size: int, shape: dict[str, Any]) -> None:
        super().__init__()
        config = layer_config(hidden_size=hidden_size, **shape)
        config._attn_implementation = "sdpa"
        self.self_attn = AttentionInParts(config, layer_idx=0)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.rotary = Rotary(config)

    @property
    def scale(self) -> float:
        """Of the scores: c^-0.5."""
        return self.self_attn.scaling

    def offer(self, rows_BNd: Tensor, positions_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, `[B, G, N, c]` each."""
        normed = self.input_layernorm(rows_BNd)
        return self.self_attn.offer(normed, self.rotary(normed, positions_BN))

    def ask(self, rows_BNd: Tensor, positions_BN: Tensor) -> Tensor:
        """Queries, `[B, H, N, c]`."""
        normed = self.input_layernorm(rows_BNd)
        return self.self_attn.ask(normed, self.rotary(normed, positions_BN))

    def finish(self, rows_BNd: Tensor, read_BHNc: Tensor) -> Tensor:
        """The rows after attention and MLP, from what their queries have read."""
        attended_BNd = rows_BNd + self.self_attn.finish(read_BHNc)
        return attended_BNd + self.mlp(self.post_attention_layernorm(attended_BNd))


@dataclass(frozen=True)
class ChimeraState:
    """What drafting remembers.

    Keys and values of all verified features and trigrams, in one list, because a draft sees all of
    them (the one thing that `extend` changes in place); f_t and m_{t+1} of the last verified
    position t; the two last tokens of each frontier node's path, itself included; keys and values
    of the drafted trigrams.
    """

    cache: GrowingCache
    final_1d: Tensor | None = None
    trigram_1d: Tensor | None = None
    recent_N2: Tensor | None = None
    drafted: Drafted | None = None


class Chimera(Drafter):
    """Heads on the last feature and on a token of context read by a small encoder.

        m_i = P R([E(x_{i-2}); E(x_{i-1}); E(x_i)])      the trigram encoder; x_{-1} is x_0
        c^k_t = layer(m_{t+1+k} | f_{<=t}, m_{1..t+1+k})  the full-context encoder
        logits = U_k [f_t; c^k_t]  predict x_{t+2+k},     U_k starts as [W, W]

    R is a residual block on 3d that starts as the identity, P: 3d -> d, E the target's embedding,
    frozen and not stored. The layer is one Llama decoder layer without a final norm: the query of
    m_{t+1+k} reads features at rotary positions 0..t and trigrams at 1..t+1+k. With the target's
    frozen head the state is f_t + c^k_t, to which [W, W] is the same map.

    What the published text and code leave open, and what is done here. The encoder is run again
    for every head k > 0 on trigrams that include the drafted tokens; the code also feeds "previous
    outputs", which its mask then hides. Here a run sees exactly what one run over the verified text
    and its own path of drafts would: earlier outputs are functions of the same inputs and are not
    fed back, nothing is detached, and the true tokens stand for the drafted ones in training, so
    that what is trained is what is drafted. Features are only read, never queried, because nobody
    looks at their outputs. Keys and values are made once for all heads: the cost of a head is one
    attention over 2T keys and one MLP. The published distillation term is computed there but not
    used; loss=forward_kl or weighted_sum gives one.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_shape: dict[str, Any],
        num_heads: int = 4,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        self.trigram = nn.Sequential(
            ResidualBlock(hidden_size=3 * hidden_size), nn.Linear(3 * hidden_size, hidden_size)
        )
        self.encoder = ContextEncoder(hidden_size=hidden_size, shape=target_shape)
        self.adds = str(head.get("_target_")).endswith(".FrozenHead")
        size = draft_vocab_size or vocab_size
        self.heads = nn.ModuleList(
            build_head(head, hidden_size=self.state_size, vocab_size=size) for _ in range(num_heads)
        )

    @property
    def num_depths(self) -> int:
        return len(self.heads)

    @property
    def state_size(self) -> int:
        return self.hidden_size if self.adds else 2 * self.hidden_size

    def head(self, depth: int) -> Head:
        return self.heads[depth]  # type: ignore[return-value]

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        rows_Vd = target.head_weight_Vd
        if self.draft_ids_D is not None:
            rows_Vd = rows_Vd[self.draft_ids_D]
        for depth in range(self.num_depths):
            self.head(depth).copy_rows(torch.cat([rows_Vd, rows_Vd], dim=-1))

    def _trigrams(self, tokens_BT: Tensor) -> Tensor:
        """Of tokens i, i+1, i+2 for every i: `[B, T]` -> `[B, T-2, d]`."""
        embedded_BTd = self.embed(tokens_BT)
        parts = (embedded_BTd[:, :-2], embedded_BTd[:, 1:-1], embedded_BTd[:, 2:])
        return self.trigram(torch.cat(parts, dim=-1))

    def _state(self, final: Tensor, context: Tensor) -> Tensor:
        """What a head reads."""
        return final + context if self.adds else torch.cat([final, context], dim=-1)

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        return self.unroll_taught(features, tokens_BT, self.num_depths, None)

    def unroll_taught(
        self, features: Features, tokens_BT: Tensor, depths: int, taught_BT: Tensor | None
    ) -> Iterator[Depth]:
        """Every position is offered and asks; what it has read goes on where a head is taught."""
        T = tokens_BT.shape[1]
        device = tokens_BT.device
        # m_{t+1} stands at index t; the last one would need x_T and reads token 0 (no label).
        padded_BT = torch.cat([tokens_BT[:, :1], tokens_BT, torch.zeros_like(tokens_BT[:, :1])], 1)
        trigrams_BTd = self._trigrams(padded_BT)
        positions_1T = torch.arange(T, device=device)[None]
        keys_f, values_f = self.encoder.offer(features.final_BTd, positions_1T)
        keys_m, values_m = self.encoder.offer(trigrams_BTd, positions_1T + 1)
        queries = self.encoder.ask(trigrams_BTd, positions_1T + 1)
        keys, values = torch.cat([keys_f, keys_m], 2), torch.cat([values_f, values_m], 2)
        all_TT = torch.ones(T, T, dtype=torch.bool, device=device)
        for k in range(self.num_depths):
            # Row t asks with m_{t+1+k}, at index t+k, and sees f_{<=t} and m_{<=t+1+k}.
            past = min(k, T)
            read = F.scaled_dot_product_attention(
                F.pad(queries[:, :, k:], (0, 0, 0, past)),
                keys,
                values,
                attn_mask=torch.cat([all_TT.tril(), all_TT.tril(k)], dim=-1),
                scale=self.encoder.scale,
                enable_gqa=True,
            )
            rows = None if taught_BT is None else ComputedRows.of(taught_BT, [1 + k])
            context_BTd = at_rows(
                rows,
                lambda asking, read: self.encoder.finish(asking, read.transpose(1, 2)),
                F.pad(trigrams_BTd[:, k:], (0, 0, 0, past)),
                read.transpose(1, 2),
            )
            yield Depth(self._state(features.final_BTd, context_BTd), self.head(k), shift=1 + k)

    def start(self, features: Features, tokens_1T: Tensor) -> ChimeraState:
        """x_0 has no feature row of its own in `extend`, but the first trigrams contain it."""
        first_12 = tokens_1T[:, :1].expand(-1, 2)
        state = ChimeraState(GrowingCache(), recent_N2=first_12)
        return self.extend(state, features, tokens_1T[:, 1:])

    def extend(self, state: ChimeraState, features: Features, tokens_1N: Tensor) -> ChimeraState:
        assert state.recent_N2 is not None, "start comes before extend"
        # The drafts' tokens are forgotten: `recent` of a verified state has one row.
        known_1M = torch.cat([state.recent_N2, tokens_1N], dim=1)
        trigrams_1Nd = self._trigrams(known_1M)
        past = state.cache.get_seq_length() // 2
        positions_1N = torch.arange(past, past + tokens_1N.shape[1], device=tokens_1N.device)[None]
        for rows, positions in (
            (features.final_BTd, positions_1N),
            (trigrams_1Nd, positions_1N + 1),
        ):
            state.cache.update(*self.encoder.offer(rows, positions), 0)
        return ChimeraState(
            state.cache, features.final_BTd[:, -1], trigrams_1Nd[:, -1], known_1M[:, -2:]
        )

    def step(
        self, state: ChimeraState, depth: int, frontier: Frontier
    ) -> tuple[ChimeraState, Tensor]:
        assert state.final_1d is not None and state.trigram_1d is not None, "extend comes first"
        assert state.recent_N2 is not None
        N = len(frontier.tokens_N)
        # The cache holds t+1 features and as many trigrams; the asking one stands at t+1+depth.
        at = state.cache.get_seq_length() // 2 + depth
        positions_1N = torch.full((1, N), at, device=frontier.tokens_N.device)
        if depth == 0:
            # The root's trigram is a verified one: all of its tokens are known.
            trigrams_Nd, grown = state.trigram_1d, state
            layer: Any = state.cache.layers[0]
            read = F.scaled_dot_product_attention(
                self.encoder.ask(trigrams_Nd[None], positions_1N),
                layer.keys,
                layer.values,
                scale=self.encoder.scale,
                enable_gqa=True,
            )
        else:
            tokens_N3 = torch.cat(
                [state.recent_N2[frontier.parents_N], frontier.tokens_N[:, None]], dim=1
            )
            trigrams_Nd = self._trigrams(tokens_N3)[:, 0]
            path = Path(state.cache, state.drafted, frontier.parents_N)
            path.update(*self.encoder.offer(trigrams_Nd[None], positions_1N))
            read = path.attend(
                self.encoder.ask(trigrams_Nd[None], positions_1N), self.encoder.scale
            )
            grown = replace(state, recent_N2=tokens_N3[:, 1:], drafted=path.drafted)
        context_Nd = self.encoder.finish(trigrams_Nd[None], read)[0]
        return grown, self._state(state.final_1d.expand(N, -1), context_Nd)
