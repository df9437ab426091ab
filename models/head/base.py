"""What every vocabulary head does."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.target import Target


class Head(nn.Module, ABC):
    """Maps states `[..., d]` to draft logits `[..., D]`, one position at a time.

    Being position-wise is the contract: a loss runs a head chunk by chunk over rows.
    """

    def __init__(self, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size

    @abstractmethod
    def forward(self, states: Tensor) -> Tensor:
        """Draft logits of `states`."""

    def narrow(self, states: Tensor) -> Tensor:
        """What `matrix` multiplies: the states, unless a head makes them narrower first."""
        return states

    def matrix(self) -> tuple[Tensor, Tensor | None] | None:
        """(W, b) where the logits are exactly `narrow(states) W^T + b`; None for other heads.

        The loss then multiplies itself and adds gradients in place, without a copy of W's size.
        """
        return None

    def forget(self) -> None:
        """Drop what was computed from the weights: they may have changed unseen."""

    def bind(self, target: Target, draft_ids_D: Tensor | None) -> None:
        """Reach the target's head, for heads that use it frozen. Stores nothing."""

    def init_from(self, target: Target, draft_ids_D: Tensor | None) -> None:
        """Start from the target's head (rows `draft_ids_D`, all when None)."""

    def copy_rows(self, rows_Dd: Tensor) -> None:
        """Start from the rows of any vocabulary matrix, for heads that own one."""
