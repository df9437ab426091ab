"""Medusa heads (Cai et al., 2024, arXiv 2401.10774).

Shape legend: B sequences, T positions, N tree nodes, d hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from models.drafter.base import Depth, Drafter, Frontier
from models.drafter.blocks import ResidualBlock
from models.head import Head, build_head
from models.target import Features, Target


class Medusa(Drafter):
    """K heads that all read f_t: head k predicts x_{t+2+k} from f_t alone.

        y_k = blocks_k(f_t),  block(y) = y + SiLU(A y + a),  A = 0 at the start
        logits_k = U_k y_k,   U_k starts from the target's head

    A draft does not depend on the tokens drafted before it, so every node of one depth has the same
    children. Deviation from the released code: with `num_layers` > 1 it repeats one block object
    (tied weights); here every block has its own.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        num_heads: int = 4,
        num_layers: int = 1,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(hidden_size=hidden_size) for _ in range(num_layers)))
            for _ in range(num_heads)
        )
        size = draft_vocab_size or vocab_size
        self.heads = nn.ModuleList(
            build_head(head, hidden_size=hidden_size, vocab_size=size) for _ in range(num_heads)
        )

    @property
    def num_depths(self) -> int:
        return len(self.blocks)

    @property
    def reads_history(self) -> bool:
        return False

    def head(self, depth: int) -> Head:
        return self.heads[depth]  # type: ignore[return-value]

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        for depth in range(self.num_depths):
            self.head(depth).init_from(target, self.draft_ids_D)

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        for k, block in enumerate(self.blocks):
            yield Depth(block(features.final_BTd), self.head(k), shift=1 + k)

    def extend(self, state: Any, features: Features, tokens_1N: Tensor) -> Tensor:
        """The state is f_t of the last verified position, `[1, d]`."""
        return features.final_BTd[:, -1]

    def step(self, state: Tensor, depth: int, frontier: Frontier) -> tuple[Tensor, Tensor]:
        states_1d = self.blocks[depth](state)
        return state, states_1d.expand(len(frontier.tokens_N), -1)
