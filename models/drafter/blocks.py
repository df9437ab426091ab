"""Parts that drafter families share.

Shape legend: B sequences, T positions, d hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    rotate_half,
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


def layer_config(
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    max_positions: int,
    rope_parameters: dict[str, Any] | None = None,
    rope_theta: float = 10_000.0,
    rms_norm_eps: float = 1e-6,
) -> LlamaConfig:
    """One Llama layer in the shape of `Target.layer_shape`.

    `rope_theta` alone is what drafters saved before `rope_parameters` existed, and those saved
    before `rms_norm_eps` did have 1e-6.
    """
    rope = rope_parameters or {"rope_type": "default", "rope_theta": rope_theta}
    return LlamaConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_positions,
        num_hidden_layers=1,
        rms_norm_eps=rms_norm_eps,
        rope_parameters=dict(rope),  # type: ignore[arg-type]
    )


class Rotary(LlamaRotaryEmbedding):
    """Rotary angles with every scaling of transformers, for heads that rotate whole or in part.

    With `partial_rotary_factor` r only r * head_dim dimensions rotate: the others get angle 0, cos
    1 and sin 0. They are the last of each half of a head, not the last of the whole (rotation pairs
    dimension i with i + head_dim / 2); a drafter trained from scratch cannot tell, but an export to
    an engine that rotates the first dimensions has to reorder the rows of q and k.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert config.head_dim is not None
        self.head_dim: int = config.head_dim

    @staticmethod
    def compute_default_rope_parameters(
        config: LlamaConfig,
        **kwargs: Any,  # noqa: ARG004 (the signature is transformers')
    ) -> tuple[Tensor, float]:
        """theta^(-2i/n) of the n dimensions that rotate."""
        rope: Any = config.rope_parameters
        assert config.head_dim is not None
        n = int(config.head_dim * (rope.get("partial_rotary_factor") or 1.0))
        exponent = torch.arange(0, n, 2, dtype=torch.float) / n
        return 1.0 / rope["rope_theta"] ** exponent, 1.0

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x, position_ids)
        missing = (self.head_dim - cos.shape[-1]) // 2
        if not missing:
            return cos, sin
        halves = cos.unflatten(-1, (2, -1)), sin.unflatten(-1, (2, -1))
        cos, sin = (
            F.pad(h, (0, missing), value=v) for h, v in zip(halves, (1.0, 0.0), strict=True)
        )
        return cos.flatten(-2), sin.flatten(-2)


class AttentionInParts(LlamaAttention):
    """What a row asks, what a row offers to be read, and what becomes of what it has read.

    For layers whose queries are other rows than their keys, or that say themselves what is read.
    `turns` are the cosines and sines of the rows' rotary angles.
    """

    def ask(self, z_BNe: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Queries, `[B, H, N, c]`."""
        return _turned(self._heads(self.q_proj(z_BNe)), turns)

    def offer(self, z_BNe: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values, `[B, G, N, c]` each."""
        keys = _turned(self._heads(self.k_proj(z_BNe)), turns)
        return keys, self._heads(self.v_proj(z_BNe))

    def finish(self, read_BHNc: Tensor) -> Tensor:
        """The output of the attention, `[B, N, d]`."""
        return self.o_proj(read_BHNc.transpose(1, 2).flatten(-2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _turned(x_BHNc: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (turn_BNc[:, None] for turn_BNc in turns)
    return x_BHNc * cos + rotate_half(x_BHNc) * sin


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
        max_positions: int,
        rope_parameters: dict[str, Any] | None = None,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        config = layer_config(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate_size,
            max_positions=max_positions,
            rope_parameters=rope_parameters,
            rope_theta=rope_theta,
            rms_norm_eps=rms_norm_eps,
        )
        config._attn_implementation = "sdpa"
        self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.norm = LlamaRMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.rotary = Rotary(config)

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
