"""Logits -> the distribution a sampler really draws from.

p (target) and q (draft) always mean the distributions *after* these processors, because acceptance
is decided there.
"""

import torch
from torch import Tensor


def probabilities(
    logits: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """softmax(logits / temperature) cut to the top-k ids, then to the top-p nucleus, in fp32.

    temperature 0 is greedy: all mass on the argmax (the lowest id among equals). The nucleus is the
    smallest set of most likely ids whose mass reaches top_p; the most likely id always stays.
    """
    logits = logits.float()
    if temperature == 0.0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    p = logits.softmax(-1)
    if top_p < 1.0:
        sorted_p, order = p.sort(dim=-1, descending=True)
        # An id is cut when the mass *before* it already reaches top_p.
        cut = sorted_p.cumsum(-1) - sorted_p >= top_p
        p = p.masked_fill(torch.zeros_like(cut).scatter_(-1, order, cut), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(p_NV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One id per row of a distribution, `[N]`."""
    return torch.multinomial(p_NV, 1, generator=generator).squeeze(-1)


def draw(p_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """One id per row by inverting the cumulative distribution at given uniform numbers, `[N]`.

    The noise is the caller's, so that a draw need not depend on what else is in the batch.
    """
    return draw_many(p_NV, uniform_N[:, None])[:, 0]


def draw_many(p_NV: Tensor, uniform_NS: Tensor) -> Tensor:
    """S ids per row with replacement, `[N, S]`, in the same way."""
    cdf_NV = p_NV.double().cumsum(-1)
    points_NS = uniform_NS.to(cdf_NV.device, torch.double) * cdf_NV[:, -1:]
    return torch.searchsorted(cdf_NV, points_NS, right=True).clamp(max=p_NV.shape[-1] - 1)
