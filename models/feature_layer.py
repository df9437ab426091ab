"""The decoder layer of drafters that feed back their own features.

Shape legend: B sequences, T positions, N computed rows, d hidden size, e width of the input.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from models.autocast import in_autocast
from models.computed import ComputedRows
from models.drafter.blocks import AttentionInParts, Rotary, layer_config


class FeatureLayer(nn.Module):
    """A Llama decoder layer that leaves the norms of its input to the family.

        a = r + Attention(z),  y = a + MLP(RMSNorm(a))

    z is `inputs` times as wide as the residual r (EAGLE-3: 2). With `outputs` = 2 the MLP is twice
    as wide as a, and y = [a; a] + MLP(RMSNorm(a)) (FSPAD).
    """

    def __init__(
        self, *, hidden_size: int, shape: dict[str, Any], inputs: int = 1, outputs: int = 1
    ) -> None:
        super().__init__()
        config = layer_config(hidden_size=hidden_size, **shape)
        self.self_attn = AttentionInParts(config, layer_idx=0)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.outputs = outputs
        if inputs > 1:
            for name in ("q_proj", "k_proj", "v_proj"):
                narrow: nn.Linear = getattr(self.self_attn, name)
                wide = nn.Linear(inputs * hidden_size, narrow.out_features, bias=False)
                setattr(self.self_attn, name, wide)
        if outputs > 1:
            down = self.mlp.down_proj
            self.mlp.down_proj = nn.Linear(down.in_features, outputs * hidden_size, bias=False)

    def forward(
        self,
        z_BTe: Tensor,
        residual_BTd: Tensor,
        positions_1T: Tensor,
        memory: Any,
        rows: ComputedRows | None = None,
    ) -> Tensor:
        """`memory` takes the keys and values of these rows, and is what they attend to.

        With `rows`, positions must be 0..T-1, the other rows are only attended to, and the outputs
        are `[1, N, d]`.
        """
        z_BTe = in_autocast(z_BTe)
        turns = self.rotary(residual_BTd, positions_1T)
        asks_BNe, its_turns = z_BTe, turns
        if rows is not None:
            asks_BNe, residual_BTd = rows.take(z_BTe), rows.take(residual_BTd)
            its_turns = turns[0][:, rows.positions_1N[0]], turns[1][:, rows.positions_1N[0]]
        # The same modules in the same order with and without `rows`: processes that share the
        # weights among them put them together in step.
        queries = self.self_attn.ask(asks_BNe, its_turns)
        memory.update(*self.self_attn.offer(z_BTe, turns))
        attended_BTd = self.self_attn.finish(memory.attend(queries, self.self_attn.scaling))
        a_BTd = residual_BTd + attended_BTd
        wide = torch.cat([a_BTd] * self.outputs, dim=-1) if self.outputs > 1 else a_BTd
        return wide + self.mlp(in_autocast(self.post_attention_layernorm(a_BTd)))
