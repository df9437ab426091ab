"""EAGLE-1 (Li et al., 2024, arXiv 2401.15077); EAGLE-2 (arXiv 2406.16858) drafts with its weights.

Shape legend: B sequences, T positions, d hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.feature_drafter import FeatureDrafter, FeatureLayer
from models.target import Features


class Eagle(FeatureDrafter):
    """Predicts the target's next feature from its last one and the token that came.

        z_t = C [E(x_{t+1}); f_t] + c
        y_t = decoder layer(z_{<=t}),  without a norm of its input
        f'_{t+1} = y_t,  logits = W f'_{t+1}  predict x_{t+2}

    f is the feature after the target's final norm, so y has no norm of its own and W is the
    target's frozen head. Later drafts read f' in place of f. Trained on one depth with
    1.0 SmoothL1(f'_{t+1}, f_{t+1}) + 0.1 soft cross-entropy(p_{t+1}, q).

    `noise` a adds U(-a, a) to the features read in training, so that the drafter bears its own
    errors later; the released code also multiplies it by 512/T (`noise_by_length`, T the padded
    length). EAGLE-2 is this drafter with tree=dynamic.
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
            draft_vocab_size=draft_vocab_size,
            head=head,
        )
        self.noise = noise
        self.noise_by_length = noise_by_length
        self.fc = nn.Linear(2 * hidden_size, hidden_size)
        self.layer = FeatureLayer(hidden_size=hidden_size, shape=target_shape)

    def read(self, features: Features) -> Tensor:
        given_BTd = features.final_BTd
        if not self.training or not self.noise:
            return given_BTd
        amount = self.noise * (512 / given_BTd.shape[1] if self.noise_by_length else 1.0)
        return given_BTd + amount * (2 * torch.rand_like(given_BTd) - 1)

    def mix(self, embedded: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        z = self.fc(torch.cat([embedded, given], dim=-1))
        return z, z

    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return out, out
