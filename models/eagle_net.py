"""EAGLE's net, which HASS, FSPAD and GRIFFIN train otherwise or extend.

Shape legend: B sequences, T positions, d hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.feature_drafter import FeatureDrafter
from models.feature_layer import FeatureLayer
from models.scales import logit_spread, typical_sizes
from models.target import Features, Target


class EagleNet(FeatureDrafter):
    """z_t = C [E(x_{t+1}); f_t] + c, one decoder layer on z without a norm of its input.

    f is the feature after the target's final norm, and so is what the layer predicts: it has no
    norm of its output either. `noise` a adds U(-a, a) to the features read in training, so that the
    drafter bears its own errors later; the released code also multiplies it by 512/T
    (`noise_by_length`, T the padded length).

    C starts random, but so that embedding and feature count alike and that the first logits have a
    standard deviation of about 1 (models/scales.py); in the released code the feature, ten times as
    large, hides the token at first.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_shape: dict[str, Any],
        noise: float,
        noise_by_length: bool,
        draft_vocab_size: int | None,
        head: dict[str, Any],
        steps: int = 1,
        outputs: int = 1,
    ) -> None:
        super().__init__(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            head=head,
            steps=steps,
        )
        if noise < 0.0:
            raise ValueError(
                f"drafter.noise={noise} must not be negative: features read in training get "
                "uniform noise between -noise and noise; 0 adds none."
            )
        self.noise = noise
        self.noise_by_length = noise_by_length
        self.fc = nn.Linear(2 * hidden_size, hidden_size)
        self.layer = FeatureLayer(hidden_size=hidden_size, shape=target_shape, outputs=outputs)

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        super().init_from(target, calibration)
        if not calibration:
            return
        sizes, d = typical_sizes(target, calibration), self.hidden_size
        # Random weights of nn.Linear turn inputs of size 1 into outputs of size 3^-1/2.
        soft = 3**0.5 / logit_spread(target, self.draft_ids_D)
        with torch.no_grad():
            self.fc.weight[:, :d] *= soft / sizes.embedding
            self.fc.weight[:, d:] *= soft / sizes.final
            self.fc.bias.mul_(soft)

    def read(self, features: Features) -> Tensor:
        given_BTd = features.final_BTd
        if not self.training or not self.noise:
            return given_BTd
        amount = self.noise * (512 / given_BTd.shape[1] if self.noise_by_length else 1.0)
        return given_BTd + amount * (2 * torch.rand_like(given_BTd) - 1)

    def fuse(self, embedded: Tensor, given: Tensor) -> Tensor:
        """C [E(x); f] + c."""
        return self.fc(torch.cat([embedded, given], dim=-1))

    def mix(self, embedded: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        z = self.fuse(embedded, given)
        return z, z

    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return out, out


class DualNet(EagleNet):
    """EAGLE's net with an output of two halves: one predicts tokens, one is fed back (FSPAD)."""

    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        predicts, regresses = out.chunk(2, dim=-1)
        return predicts, regresses
