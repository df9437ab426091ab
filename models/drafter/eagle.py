"""EAGLE-1 (Li et al., 2024, arXiv 2401.15077); EAGLE-2 (2406.16858) drafts with its weights."""

from typing import Any

from models.eagle_net import EagleNet


class Eagle(EagleNet):
    """Predicts the target's next feature from its last one and the token that came.

        z_t = C [E(x_{t+1}); f_t] + c
        f'_{t+1} = decoder layer(z_{<=t}),  without norms of its input and output
        logits = W f'_{t+1}  predict x_{t+2},  W the target's frozen head

    Later drafts read f' in place of f. Trained on one depth with 1.0 SmoothL1(f'_{t+1}, f_{t+1}) +
    0.1 soft cross-entropy(p_{t+1}, q), on features with noise (models/eagle_net.py). EAGLE-2 is
    this drafter with tree=dynamic.
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
        )
