"""Gradients that are added up chunk by chunk.

Shape legend: n rows of one chunk, d hidden size, D draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 2**22
"""Elements of a product that is added to a gradient of another dtype at a time."""


class Gradients:
    """The gradients a walk returns: of states, features, matrices and other head parameters.

    Sums over chunks are made in place, in the dtype of the parameter.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.of = {id(t): torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tensors}

    def wants(self, tensor: Tensor | None) -> bool:
        return tensor is not None and id(tensor) in self.of

    def add_rows(self, tensor: Tensor, index_n: Tensor, grad_nd: Tensor) -> None:
        """Add to rows of the flattened gradient (depths may share their states)."""
        grad = self.of[id(tensor)]
        grad.view(-1, grad.shape[-1]).index_add_(0, index_n, grad_nd.to(grad.dtype))

    def add(self, tensor: Tensor, grad: Tensor) -> None:
        self.of[id(tensor)].add_(grad)

    def add_product(self, tensor: Tensor, dz_nD: Tensor, h_nd: Tensor) -> None:
        """Add dz^T h to the gradient of a matrix `[D, d]` without a temporary of its size."""
        grad_Dd = self.of[id(tensor)]
        if grad_Dd.dtype == dz_nD.dtype:
            grad_Dd.addmm_(dz_nD.T, h_nd)
            return
        step = max(1, TILE // h_nd.shape[-1])
        for begin in range(0, len(grad_Dd), step):
            grad_Dd[begin : begin + step].add_(dz_nD[:, begin : begin + step].T @ h_nd)
