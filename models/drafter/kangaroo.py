"""Kangaroo: the target's first layers, an adapter and its own head (Liu et al., 2024, 2404.18911).

Shape legend: B sequences, T positions, N frontier nodes, P verified tokens the adapter has not read
yet, d hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from models.cache import GrowingCache, causal_rows
from models.drafter.base import Depth, Drafter, Frontier
from models.drafter.blocks import Rotary, layer_config
from models.head import Head, build_head
from models.lm_state import LmState, Memory, Step, additive, plan_step
from models.split import FirstLayers, SharedLayers
from models.target import Features, Target


class Adapter(nn.Module):
    """o = norm_out(u + attention(norm_in(u))): no feed-forward part, no embedding.

    Attention has the target's heads, no biases, rotary positions that count tokens from 0. In a
    cache its keys and values are layer `index`.
    """

    def __init__(self, *, hidden_size: int, shape: dict[str, Any], index: int) -> None:
        super().__init__()
        config = layer_config(hidden_size=hidden_size, **shape)
        config._attn_implementation = "sdpa"
        self.norm_in = LlamaRMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.attention = LlamaAttention(config, layer_idx=index)
        self.norm_out = LlamaRMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(
        self,
        hidden_BTd: Tensor,
        *,
        positions_BT: Tensor,
        visible: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """o at T new positions. `visible` is a boolean `[1, 1, T, keys]`; None is causal."""
        attended_BTd, _ = self.attention(
            self.norm_in(hidden_BTd),
            position_embeddings=self.rotary(hidden_BTd, positions_BT),
            attention_mask=visible,
            past_key_values=cache,
        )
        return self.norm_out(hidden_BTd + attended_BTd)


@dataclass
class KangarooMemory(Memory):
    """`cache` holds the adapter's keys and values, as the layer behind those of the shallow layers,
    and theirs too unless they are `shared` with the target. `waiting_1Pd` is then the h of the
    verified tokens that the adapter has not read, the root left out."""

    shared: SharedLayers | None = None
    waiting_1Pd: Tensor | None = None


class Kangaroo(Drafter):
    """The target's first l layers (`shallow_layers`), an adapter and a head.

        u_t = h^l_t,  y_t = norm_out(u_t + attention(norm_in(u_{<=t})))
        logits = U y_t  predict x_{t+1}

    Recurrent: one `Depth` of shift 0 serves every draft; the state for (t, k) is y_{t+1+k}. The
    shallow layers are the target's, not stored and not trained. While drafting they are run here
    (`computed_layers`): on the target's own cache where a decoder shares it (`start_shared`), so
    that they see each token once in drafting and verification together; else on a cache of the
    drafter's own.

    Deviations from the released code: training and decoding number positions alike (there training
    drops the first token and counts the others from 0); norm_out starts as the target's final norm,
    whose scale it would take a long training to reach from 1.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_shape: dict[str, Any],
        shallow_layers: int = 2,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        if shallow_layers < 1:
            raise ValueError(
                f"drafter.shallow_layers={shallow_layers} should be 1 or more, because the adapter "
                "reads what the target's first layers make of the tokens; give a larger number."
            )
        self.feature_layers = self.computed_layers = (shallow_layers,)
        self.first = FirstLayers(shallow_layers)
        self.adapter = Adapter(hidden_size=hidden_size, shape=target_shape, index=shallow_layers)
        self.vocab_head = build_head(
            head, hidden_size=hidden_size, vocab_size=draft_vocab_size or vocab_size
        )

    @property
    def num_depths(self) -> int:
        return 1

    @property
    def max_depth(self) -> None:
        return None

    def head(self, depth: int) -> Head:
        return self.vocab_head

    def bind(self, target: Target) -> Drafter:
        super().bind(target)
        self.first.bind(target)
        return self

    @torch.no_grad()
    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        self.vocab_head.init_from(target, self.draft_ids_D)
        # An RMS norm makes its scale of ones, however it is parametrised (w, or 1 + w).
        ones_d = torch.ones(self.hidden_size, dtype=target.dtype, device=target.device)
        self.adapter.norm_out.weight.copy_(target.model.get_decoder().norm(ones_d))

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        hidden_BTd = features.layers[self.first.layers]
        positions_1T = torch.arange(hidden_BTd.shape[1], device=hidden_BTd.device)[None]
        yield Depth(self.adapter(hidden_BTd, positions_BT=positions_1T), self.vocab_head, shift=0)

    def start(self, features: Features, tokens_1T: Tensor) -> LmState:
        """Read x_0..x_{T-2} on a cache of the drafter's own; the last token is the root."""
        memory = KangarooMemory()
        hidden_1Td = self.first(tokens_1T[:, :-1], cache=memory.cache)
        return self._begin(memory, hidden_1Td, tokens_1T)

    def start_shared(
        self, features: Features, tokens_1T: Tensor, cache: GrowingCache
    ) -> tuple[LmState, SharedLayers]:
        shared = SharedLayers(self.first.split, cache)
        hidden_1Td = features.layers[self.first.layers]
        memory = KangarooMemory(shared=shared, waiting_1Pd=hidden_1Td[:, :0])
        return self._begin(memory, hidden_1Td, tokens_1T), shared

    def _begin(self, memory: KangarooMemory, hidden_1Td: Tensor, tokens_1T: Tensor) -> LmState:
        length = hidden_1Td.shape[1]
        positions_1T = torch.arange(length, device=hidden_1Td.device)[None]
        self.adapter(hidden_1Td.to(self.dtype), positions_BT=positions_1T, cache=memory.cache)
        memory.length, memory.unread = length, tokens_1T[0, -1:].tolist()
        return LmState(memory)

    def extend(self, state: LmState, features: Features, tokens_1N: Tensor) -> LmState:
        """Nothing is computed here: keys of drafts that were accepted are kept, the rest is read
        with the next root."""
        memory = state.memory
        assert isinstance(memory, KangarooMemory)
        memory.advance(tokens_1N[0].tolist())
        if memory.waiting_1Pd is not None:
            # The last P verified positions wait, the root (whose h is not known yet) apart.
            known_1Pd = torch.cat([memory.waiting_1Pd, features.layers[self.first.layers]], dim=1)
            count = len(memory.unread) - 1
            memory.waiting_1Pd = known_1Pd[:, known_1Pd.shape[1] - count :]
        return LmState(memory)

    def step(self, state: LmState, depth: int, frontier: Frontier) -> tuple[LmState, Tensor]:
        memory = state.memory
        assert isinstance(memory, KangarooMemory)
        step = plan_step(state, depth, frontier)
        hidden_1Nd = self._shallow(memory, step, depth)
        new, device = hidden_1Nd.shape[1], hidden_1Nd.device
        visible = None if step.visible is None else step.visible[None, None]
        if visible is None and new > 1:
            visible = causal_rows(new, memory.length, device)
        states_1Nd = self.adapter(
            hidden_1Nd, positions_BT=step.positions_1N, visible=visible, cache=memory.cache
        )
        # At depth 0 what was unread before the root came along; only the root has children.
        return step.state, states_1Nd[0, -len(frontier.tokens_N) :]

    def _shallow(self, memory: KangarooMemory, step: Step, depth: int) -> Tensor:
        """h of the tokens that are read now, `[1, N, d]`."""
        tokens_1N, positions_1N, mask = step.tokens_1N, step.positions_1N, None
        if step.visible is not None:
            at_K = memory.positions(0, positions_1N.device)
            config, dtype = self.target.config, self.target.dtype
            mask = additive(step.visible, positions_1N[0], at_K, config, dtype)
        if memory.shared is None:
            hidden_1Nd = self.first(
                tokens_1N, attention_mask=mask, positions_BT=positions_1N, cache=memory.cache
            )
            return hidden_1Nd.to(self.dtype)
        if depth == 0:
            # The target has read what was unread before the root.
            memory.shared.begin()
            tokens_1N, positions_1N = tokens_1N[:, -1:], positions_1N[:, -1:]
        hidden_1Nd = self.first(
            tokens_1N, attention_mask=mask, positions_BT=positions_1N, shared=memory.shared
        ).to(self.dtype)
        assert memory.waiting_1Pd is not None
        if depth > 0:
            return hidden_1Nd
        return torch.cat([memory.waiting_1Pd.to(self.dtype), hidden_1Nd], dim=1)
