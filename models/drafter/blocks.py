"""Parts that drafter families share.

Shape legend: B sequences, T positions, d hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from models.cache import causal_rows


class ResidualBlock(nn.Module):
    """y = R z + SiLU(A z + a), with A zero at the start (Medusa, section 2.1.1).

    `num_inputs` vectors of size d are concatenated into z. For one input R is the identity and has
    no parameters (Medusa). For several (Hydra's first block) R is a trained linear map with bias;
    its block on the first input starts as the identity, so that an untrained block passes that
    input on instead of a random mixture.
    """

    def __init__(self, *, hidden_size: int, num_inputs: int = 1) -> None:
        super().__init__()
        width = hidden_size * num_inputs
        self.linear = nn.Linear(width, hidden_size)
        nn.init.zeros_(self.linear.weight)
        self.residual: nn.Module = nn.Identity()
        if num_inputs > 1:
            residual = nn.Linear(width, hidden_size)
            nn.init.normal_(residual.weight, std=width**-0.5)
            with torch.no_grad():
                residual.weight[:, :hidden_size] = torch.eye(hidden_size)
                residual.bias.zero_()
            self.residual = residual

    def forward(self, z: Tensor) -> Tensor:
        return self.residual(z) + F.silu(self.linear(z))


class CausalLayer(nn.Module):
    """One Llama decoder layer with its own final norm, run causally over a feature sequence.

    Token positions count from 0, in training and in decoding. Weights are random at the start.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        rope_theta: float,
        max_positions: int,
    ) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate_size,
            max_position_embeddings=max_positions,
            num_hidden_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        )
        config._attn_implementation = "sdpa"
        self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.norm = LlamaRMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden_BTd: Tensor, cache: Cache | None = None) -> Tensor:
        """Outputs at the T new positions; `cache` holds the earlier ones and is extended."""
        new = hidden_BTd.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past, past + new, device=hidden_BTd.device)[None]
        # Without a past, or for one row, sdpa's own causal rule is right.
        mask = causal_rows(new, past, hidden_BTd.device) if past and new > 1 else None
        out = self.layer(
            hidden_BTd,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            position_embeddings=self.rotary(hidden_BTd, positions),
        )
        return self.norm(out)
