"""A vocabulary matrix of low rank (SlimSpec: the draft head as two thin matrices).

Shape legend: d hidden size, r rank, D draft vocabulary, V target vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.head.base import Head
from models.target import Target

ROWS = 4096
"""Rows of the vocabulary matrix in double precision at once."""


class LowRankHead(Head):
    """logits = B (A y), A: r x d, B: D x r, trained together with the drafter.

    Reads r (d + D) weights instead of d D: about d / r times fewer, with no token left out. It
    starts from the best matrix of rank r for the target's rows W, their truncated SVD (Eckart and
    Young): with W = U S V^T, A = V_r^T and B = U_r S_r. Rows of A have length 1 and rows of B the
    scale of W's, so that learning rates mean what they mean for other layers and heads.
    """

    def __init__(self, *, hidden_size: int, vocab_size: int, rank: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        if not 1 <= rank <= hidden_size:
            raise ValueError(
                f"head.rank={rank} should lie between 1 and the width of the drafter's states, "
                f"{hidden_size}, because a matrix with {hidden_size} columns has no higher rank; "
                "give a smaller rank, or use head=own."
            )
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.up(self.down(states))

    def narrow(self, states: Tensor) -> Tensor:
        return self.down(states)

    def matrix(self) -> tuple[Tensor, None]:
        return self.up.weight, None

    def init_from(self, target: Target, draft_ids_D: Tensor | None) -> None:
        weight = target.head_weight_Vd
        self.copy_rows(weight if draft_ids_D is None else weight[draft_ids_D])

    @torch.no_grad()
    def copy_rows(self, rows_Dd: Tensor) -> None:
        """Start from the best approximation of these rows."""
        down_rd, up_Dr = best_factors(rows_Dd, self.down.out_features)
        self.down.weight.copy_(down_rd)
        self.up.weight.copy_(up_Dr)


def best_factors(rows_Dd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[r, d]` and B `[D, r]` with the smallest |W - B A| (Frobenius), in fp32.

    From the eigenvectors of W^T W = V S^2 V^T, d x d, in double precision: exact, and D counts only
    in a product. A is V_r^T, and B = W V_r.
    """
    gram_dd = torch.zeros(2 * rows_Dd.shape[1:], dtype=torch.double, device=rows_Dd.device)
    for rows_nd in rows_Dd.split(ROWS):
        double_nd = rows_nd.double()
        gram_dd.addmm_(double_nd.T, double_nd)
    # Eigenvalues ascend: the last r columns, the largest first.
    down_rd = torch.linalg.eigh(gram_dd).eigenvectors[:, -rank:].flip(-1).T.float()
    up_Dr = torch.cat([F.linear(rows_nd.float(), down_rd) for rows_nd in rows_Dd.split(ROWS)])
    return down_rd, up_Dr
