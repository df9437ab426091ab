"""EAGLE-3 (Li et al., 2025, arXiv 2503.01840).

Shape legend: d hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.drafter.base import Drafter
from models.feature_drafter import FeatureDrafter
from models.feature_layer import FeatureLayer
from models.scales import logit_spread, typical_sizes
from models.target import Features, Target


class Eagle3(FeatureDrafter):
    """Reads three inner layers, predicts tokens only, and is trained on its own outputs.

        g^0_t = C [h^low_t; h^mid_t; h^high_t]             C without bias, on true features only
        c = [RMSNorm_e(E(x_{t+1+k})); RMSNorm_h(g^k_t)]    queries, keys and values of width 2d
        a = g^k_t + Attention(c),  y = a + MLP(RMSNorm(a)) the residual is g without its norm
        logits = U RMSNorm(y)  predict x_{t+2+k},          g^{k+1}_t = y

    `steps` depths are unrolled in training with gradients through all of them (training-time test),
    each attending to what decoding has by then (models/levels.py). Loss: sum_k 0.8^k soft
    cross-entropy. `feature_layers` are (2, L/2, L-3) of the target's L layers when null: the
    residual stream after so many layers. `norm_output` feeds back RMSNorm(y) instead of y;
    `norm_before_residual` makes RMSNorm_h(g) the residual (some published drafters have it).

    Deviations from the released code: the mask is aligned (models/drafter/base.py; `mask_lag` is
    theirs), losses are divided by the tokens to learn. The head starts from the target's rows and
    the final norm from the target's, made smaller so that the first logits have a standard
    deviation of about 1; C starts so that the three layers count alike, whatever their size
    (models/scales.py). Theirs start random, and with ones.
    """

    predicts_features = False

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_shape: dict[str, Any],
        feature_layers: list[int] | None = None,
        steps: int = 7,
        norm_output: bool = False,
        norm_before_residual: bool = False,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            head=head,
            steps=steps,
        )
        if feature_layers is not None and len(feature_layers) != 3:
            raise ValueError(
                f"drafter.feature_layers={feature_layers} must name three layers (low, middle, "
                "high) of the target, or be null for 2, L/2 and L-3 of its L layers."
            )
        self.feature_layers = tuple(feature_layers or ())
        self.norm_output = norm_output
        self.norm_before_residual = norm_before_residual
        self.fc = nn.Linear(3 * hidden_size, hidden_size, bias=False)
        self.layer = FeatureLayer(hidden_size=hidden_size, shape=target_shape, inputs=2)
        eps = self.layer.post_attention_layernorm.variance_epsilon
        self.input_layernorm = LlamaRMSNorm(hidden_size, eps=eps)
        self.hidden_norm = LlamaRMSNorm(hidden_size, eps=eps)
        self.norm = LlamaRMSNorm(hidden_size, eps=eps)

    def bind(self, target: Target) -> "Eagle3":
        super().bind(target)
        L = target.num_layers
        if not self.feature_layers:
            self.feature_layers = (min(2, L - 1), L // 2, max(0, L - 3))
        if not all(0 <= k < L for k in self.feature_layers):
            raise ValueError(
                f"drafter.feature_layers={list(self.feature_layers)} must lie between 0 (the "
                f"embedding) and {L - 1}, because '{target.name}' has {L} layers and the stream "
                "after the last one is what its final norm reads."
            )
        return self

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        super().init_from(target, calibration)
        # The head's rows expect what the target's final norm scales. A vector of ones shows the
        # scale, whatever way a norm stores it (w, or 1 + w); a LayerNorm would answer zeros.
        norm = getattr(target.model.get_decoder(), "norm", None)
        if norm is not None:
            ones_1d = torch.ones(1, self.hidden_size, dtype=target.dtype, device=target.device)
            with torch.no_grad():
                scale_d = norm(ones_1d)[0]
                if bool(scale_d.any()):
                    spread = logit_spread(target, self.draft_ids_D, scale_d)
                    self.norm.weight.copy_(scale_d / spread)
        if calibration:
            sizes = typical_sizes(target, calibration, self.feature_layers)
            parts = self.fc.weight.detach().split(self.hidden_size, dim=1)
            for layer, part_dd in zip(self.feature_layers, parts, strict=True):
                part_dd /= sizes.layers[layer]

    def start_from(self, earlier: Drafter) -> None:
        """Weights mean something else under other norms, which their shapes do not show."""
        for name in ("norm_output", "norm_before_residual"):
            then, now = getattr(earlier, name), getattr(self, name)
            if then != now:
                raise ValueError(
                    f"The drafter that training begins with has {name}={str(then).lower()} and "
                    f"this run drafter.{name}={str(now).lower()}, under which its weights mean "
                    f"something else; give drafter.{name}={str(then).lower()}."
                )
        super().start_from(earlier)

    def read(self, features: Features) -> Tensor:
        return self.fc(torch.cat([features.layers[k] for k in self.feature_layers], dim=-1))

    def mix(self, embedded: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.hidden_norm(given)
        z = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        return z, normed if self.norm_before_residual else given

    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        states = self.norm(out)
        return states, states if self.norm_output else out
