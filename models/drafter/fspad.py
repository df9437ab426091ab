"""FSPAD: feature sampling and partial alignment distillation (Gui et al., 2024, arXiv 2408.15562).

Shape legend: d hidden size.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.eagle_net import DualNet


class Fspad(DualNet):
    """EAGLE with the token gating its input, and with an output of its own for the next feature.

        z = C [E(x_{t+1}); f_t] + c
        y = z + D (SiLU(G E(x_{t+1})) * U RMSNorm(z))       feature sampling
        o = [a; a] + MLP(RMSNorm(a)),  a = y + Attention(y) partial alignment
        logits = W o_1  predict x_{t+2},   o_2 predicts f_{t+1} and is fed back

    o_1 and o_2 are the halves of o, so that the head's input need not be a feature. Loss:
    1.0 SmoothL1(o_2, f_{t+1}) + 0.1 soft cross-entropy(p_{t+1}, softmax(W o_1)). Trained on one
    depth, with EAGLE's noise. The layer has the target's shape; the released configurations give
    one of them other heads and widths.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_shape: dict[str, Any],
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
            outputs=2,
        )
        width = target_shape["intermediate_size"]
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)
        self.norm = LlamaRMSNorm(
            hidden_size, eps=self.layer.post_attention_layernorm.variance_epsilon
        )

    def fuse(self, embedded: Tensor, given: Tensor) -> Tensor:
        z = super().fuse(embedded, given)
        return z + self.down(F.silu(self.gate(embedded)) * self.up(self.norm(z)))
