"""HASS (Zhang et al., 2024, arXiv 2408.15766)."""

from typing import Any

from models.eagle_net import EagleNet


class Hass(EagleNet):
    """EAGLE's net, trained on the contexts that drafting has (harmonised context alignment).

    `steps` aligned forwards of one batch: forward j reads what forward j-1 predicted in place of
    the last j true features, as draft j does, without gradients through it. Forward j at row r of
    the released code is depth j at index t = r - j here (models/levels.py); its first j rows, whose
    context no draft ever has, are left out. Loss: EAGLE's plus the soft cross-entropy of the 10
    most likely tokens, summed over the forwards (depth_decay 1).

    The released code multiplies its masks into the scores before the softmax, so that hidden keys
    still take part with exp(0); here they are not there at all.
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
        )
