"""GRIFFIN (Hu et al., 2025, arXiv 2502.11018).

Shape legend: d hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.eagle_net import DualNet


class Griffin(DualNet):
    """FSPAD's two outputs, a fusion guided by the token, and training on aligned tokens.

        z = C [E(x_{t+1}); f_t] + c
        y = z + D SiLU(U [RMSNorm(z); RMSNorm(E(x_{t+1}))])   one norm for both
        o = [a; a] + MLP(RMSNorm(a)),  a = y + Attention(y);   logits = W o_1,  o_2 is fed back

    `steps` forwards without gradients between them, as in HASS. Token alignment: depth k counts at
    t only where the labels of all depths before it were among their 3 most likely drafts
    (`weighting=valid_prefix weighting.top=3`), because a draft behind a miss is never looked at.
    Loss of a depth: 1.0 SmoothL1 + 0.1 soft cross-entropy + 0.5 that of the 10 most likely tokens.

    Deviations: all forwards are trained together, where the released recipe adds one at a time and
    restarts; its first alignment mask stands one position beside its features, ours does not.
    """

    detached = True

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_shape: dict[str, Any],
        steps: int = 3,
        noise: float = 0.1,
        noise_by_length: bool = False,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            target_shape=target_shape,
            noise=noise,
            noise_by_length=noise_by_length,
            draft_vocab_size=draft_vocab_size,
            head=head,
            steps=steps,
            outputs=2,
        )
        width = target_shape["intermediate_size"]
        self.up = nn.Linear(2 * hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)
        self.norm = LlamaRMSNorm(
            hidden_size, eps=self.layer.post_attention_layernorm.variance_epsilon
        )

    def fuse(self, embedded: Tensor, given: Tensor) -> Tensor:
        z = super().fuse(embedded, given)
        both = torch.cat([self.norm(z), self.norm(embedded)], dim=-1)
        return z + self.down(F.silu(self.up(both)))
