"""Causal attention that gives the log-sum-exps of its rows, and its backward pass for given ones.

A GPU in half precision and a CPU in fp32 have fused kernels for both. In bf16 a CPU's spend most of
their time outside of matrix products, so that products over blocks of query rows are about twice as
fast (`python -m scripts.bench_attention`). With s = scale q k and s* the log-sum-exp of a row,

    forward    m = max s,  w = exp(s - m),  out = sum w v / sum w,  s* = m + log sum w
    backward   w = exp(s - s*),  dv = w^T dout,  ds = w (dout v - delta),  delta = dout . out
               dq = scale ds k,  dk = scale ds^T q

Products are rounded to bf16, which would make the weights of large scores wrong by percents. The
subtractions are therefore part of the products: [q, -s*] [k, 1] is s - s* before it is rounded, and
is near 0 where the weight is large. s* and delta, fp32, come as two bf16 columns each. Of the scale
only a power of two is multiplied into q, which loses nothing; the rest r, 1 for heads of 64 or 256,
multiplies what the product gave: s = r (q' k), q' = (scale / r) q.

Shape legend: B sequences, T positions, P query rows of a sequence, H query heads, G key and value
heads, R = H / G, c head size, n rows of a block, e keys before its end, w = c + 2, N = B * G.
"""

import math
from typing import Any

import torch
from torch import Tensor

IN_BLOCKS = True
"""False leaves bf16 on a CPU to PyTorch's kernel, for comparisons."""

ROWS = 128
"""Query rows of a block, at most."""

BLOCK_SCORES = 2**22
"""Scores of a block, at most: 8 MB in bf16, of which two or three live at a time."""


Block = tuple[int, int, int, Tensor]
"""(start, stop, end, hidden): query rows start..stop-1 and the keys before `end`. `hidden` is -inf
where a key stands behind a row, for the last keys; all these rows see the others."""


def causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, at_BP: Tensor | None = None
) -> tuple[Tensor, Tensor, Any]:
    """Output `[B, H, T, c]`, log-sum-exps `[B, H, T]`, and what the backward pass asks for besides.

    Several query heads may share a key head. Where blocks are the way, the queries may be P rows of
    every sequence, at the ascending positions `at_BP`, instead of all T.
    """
    aten = torch.ops.aten
    if in_blocks(q):
        blocks = _blocks(q, k, at_BP)
        return *_forward_blocks(q, k, v, scale, blocks), blocks
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, attn_mask=None, scale=scale
        )
        return out, lse, None
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    )
    return out, lse, (cum_q, cum_k, max_q, max_k, seed, offset)


def causal_backward(
    given: tuple[Tensor, ...], extra: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from (dout, q, k, v, out, lse).

    `out` and `lse` may be those of rows that attended to more keys than these: the gradients are
    then the part of these keys.
    """
    dout, q, k, v, out, lse = given
    aten = torch.ops.aten
    if in_blocks(q):
        return _backward_blocks(given, scale, extra)
    if extra is None:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, True, attn_mask=None, scale=scale
        )
    cum_q, cum_k, max_q, max_k, seed, offset = extra
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset,
        scale=scale,
    )  # fmt: skip


def in_blocks(q: Tensor) -> bool:
    """Whether products over blocks are the faster way for these queries."""
    return IN_BLOCKS and q.device.type == "cpu" and q.dtype == torch.bfloat16


def _forward_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: list[Block]
) -> tuple[Tensor, Tensor]:
    B, H, P, c = q.shape
    G, T = k.shape[1:3]
    power, rest = _power_of_two(scale)
    q_NRPc = _per_key_head(q * power, G)
    k_Nwe = _widened(k.flatten(0, 1), k.new_ones(B * G, T, 1)).mT
    v_NTc = v.flatten(0, 1).contiguous()
    out = torch.empty_like(q_NRPc)
    lse = torch.empty(out.shape[:-1])
    for start, stop, end, hidden in blocks:
        q_Nnc = q_NRPc[:, :, start:stop].flatten(1, 2)
        # The maximum of the rounded scores is a bf16 number: subtracting it loses nothing.
        s = _scores(q_Nnc, k_Nwe[:, :c, :end], stop - start)
        s[..., -hidden.shape[-1] :].add_(hidden)
        m = s.amax(-1, keepdim=True)
        s = _scores(_widened(q_Nnc, -m.flatten(1, 2)), k_Nwe[..., :end], stop - start)
        s[..., -hidden.shape[-1] :].add_(hidden)
        w = _times(s, rest).exp_()
        total = _row_sums(w)
        read = torch.bmm(w.flatten(1, 2), v_NTc[:, :end]).unflatten(1, (-1, stop - start))
        out[:, :, start:stop] = read / total
        lse[:, :, start:stop] = (total.log() + rest * m.float())[..., 0]
    return out.view(B, H, P, c), lse.view(B, H, P)


def _backward_blocks(
    given: tuple[Tensor, ...], scale: float, blocks: list[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out, lse = given
    B, H, P, c = q.shape
    G, T = k.shape[1:3]
    power, rest = _power_of_two(scale)
    ones = k.new_ones(B * G, T, 2)
    delta = (dout * out).sum(-1, dtype=torch.float32)
    q_NRPw = _per_key_head(_widened(q * power, _two(-lse / rest)), G)
    d_NRPw = _per_key_head(_widened(dout, _two(-delta)), G)
    k_NTw, v_NTw = _widened(k.flatten(0, 1), ones), _widened(v.flatten(0, 1), ones)
    dq = q.new_empty(B * G, H // G, P, c)
    dk, dv = torch.zeros(2, B * G, T, c)
    for start, stop, end, hidden in blocks:
        q_Nnw, d_Nnw = (x[:, :, start:stop].flatten(1, 2) for x in (q_NRPw, d_NRPw))
        s = _scores(q_Nnw, k_NTw[:, :end].mT, stop - start)
        s[..., -hidden.shape[-1] :].add_(hidden)
        w = _times(s, rest).exp_().flatten(1, 2)
        dv[:, :end].add_(torch.bmm(w.mT, d_Nnw[..., :c]))
        ds = torch.bmm(d_Nnw, v_NTw[:, :end].mT).mul_(w)
        dq[:, :, start:stop] = (torch.bmm(ds, k_NTw[:, :end, :c]) * scale).unflatten(
            1, (-1, stop - start)
        )
        dk[:, :end].add_(torch.bmm(ds.mT, q_Nnw[..., :c]))
    return (
        dq.view(B, H, P, c),
        (rest * dk).view(B, G, T, c).to(k.dtype),
        dv.view(B, G, T, c).to(v.dtype),
    )


def _blocks(q: Tensor, k: Tensor, at_BP: Tensor | None) -> list[Block]:
    """All blocks of query rows, in order."""
    B, H, P, _ = q.shape
    G, T = k.shape[1:3]
    rows = max(32, min(ROWS, BLOCK_SCORES // (B * H * T) // 32 * 32))
    edges = [(start, min(start + rows, P)) for start in range(0, P, rows)]
    if at_BP is None:
        triangle = torch.full((rows, rows), -torch.inf, dtype=q.dtype).triu(1)
        return [(i, j, j, triangle[: j - i, : j - i]) for i, j in edges]
    blocks: list[Block] = []
    for i, j in edges:
        at_B1n1 = at_BP[:, None, i:j, None]
        first = int(at_B1n1.min())
        end = min(T, (int(at_B1n1.max()) // 32 + 1) * 32)  # even sums and products are faster
        hidden_B1ne = q.new_zeros(B, 1, j - i, end - first)
        hidden_B1ne.masked_fill_(torch.arange(first, end) > at_B1n1, -torch.inf)
        blocks.append((i, j, end, hidden_B1ne.repeat_interleave(G, 0) if B > 1 else hidden_B1ne))
    return blocks


def _power_of_two(scale: float) -> tuple[float, float]:
    """(2^n, r) with 2^n r = scale and r in (0.5, 1]."""
    mantissa, exponent = math.frexp(scale)
    return (scale, 1.0) if mantissa == 0.5 else (2.0**exponent, mantissa)


def _times(s: Tensor, rest: float) -> Tensor:
    return s if rest == 1.0 else s.mul_(rest)


def _per_key_head(x: Tensor, G: int) -> Tensor:
    """`[B, H, T, ...]` -> `[N, R, T, ...]`: query heads beside the key head they share."""
    return x.unflatten(1, (G, -1)).flatten(0, 1)


def _scores(left: Tensor, right: Tensor, rows: int) -> Tensor:
    """`[N, R*n, w] x [N, w, e] -> [N, R, n, e]`."""
    return torch.bmm(left, right).unflatten(1, (-1, rows))


def _row_sums(w: Tensor) -> Tensor:
    """Sums of rows, fp32, `[..., 1]`: of 16 bf16 sums where possible, which needs no fp32 copy.

    Each of the 16 is rounded by itself, so that the error is a quarter of one bf16 rounding.
    """
    if w.shape[-1] % 16 == 0:
        w = w.unflatten(-1, (16, -1)).sum(-1)
    return w.sum(-1, keepdim=True, dtype=torch.float32)


def _widened(x: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([x, columns], dim=-1)


def _two(x: Tensor) -> Tensor:
    """fp32 numbers as two bf16 columns that add up to them."""
    high = x.bfloat16()
    return torch.stack([high, (x - high).bfloat16()], dim=-1)
