"""Attention over unrolled drafts: one pattern for all families that feed back their own features.

Such a family reads true features once (level 0) and then its own outputs, k times (level k). The
state of position t at level k stands for the draft that began at t and is k tokens long. What it
may attend to is what decoding has by then: the verified positions s <= t, and its own path, which
are the states of the same t at levels 1..k. `visible` says exactly this; its rotary position is
t + k.

    EAGLE-3's training-time test (arXiv 2503.01840) is this pattern with gradients through all
    levels. HASS (arXiv 2408.15766) is it with the features detached between levels: forward j of
    HASS at its row r is level j here at index t = r - j.

The scores of all levels share one softmax. Query rows never form a [levels*T, levels*T] matrix:
level 0 is plain causal attention, and every later level adds one key to a row. The two parts are
joined by their log-sum-exps wherever PyTorch has a fused causal kernel that gives its own (a CPU, a
GPU in half precision); elsewhere flex_attention skips the empty blocks of the same pattern.

Where only some rows are computed (models/computed.py), the keys of level 0 are still those of every
position; queries, and the keys of later levels, are those rows alone, as one sequence.

Shape legend: B sequences, T positions, N computed rows, H query heads, G key and value heads,
R = H / G, c head size, K levels.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from models.autocast import in_autocast
from models.causal import causal, causal_backward, in_blocks
from models.computed import ComputedRows

Row = Any
"""A row or level index: an int, or integer tensors that broadcast."""


def visible(row: Row, level: Row, key_row: Row, key_level: Row) -> Any:
    """Whether the query of `row` at `level` sees the key of `key_row` at `key_level`."""
    verified = (key_level == 0) & (key_row <= row)
    own_path = (key_level > 0) & (key_level <= level) & (key_row == row)
    return verified | own_path


class Levels:
    """The keys and values of every level so far: training's memory of models/feature_layer.py.

    `rows` are those whose queries come next; None: every row.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows: ComputedRows | None = None

    def update(self, keys_BGTc: Tensor, values_BGTc: Tensor) -> None:
        """Take the keys and values of the next level."""
        self.keys.append(in_autocast(keys_BGTc))
        self.values.append(in_autocast(values_BGTc))

    def attend(self, queries_BHTc: Tensor, scale: float) -> Tensor:
        """What the queries of the newest level read, `[B, H, T, c]`."""
        queries = in_autocast(queries_BHTc)
        return attend_levels(queries, self.keys, self.values, scale, self.rows)


def attend_levels(
    queries_BHTc: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
    rows: ComputedRows | None = None,
) -> Tensor:
    """Attention of the last level's queries over the `[B, G, T, c]` keys of levels 0..K-1.

    With `rows`, queries and what they read are `[1, H, N, c]`, keys of later levels `[1, G, N, c]`.
    """
    alone = len(keys) == 1 and not in_blocks(queries_BHTc)
    if fused(queries_BHTc) and not alone:
        return _JoinedLevels.apply(scale, len(keys), rows, queries_BHTc, *keys, *values)  # type: ignore[return-value]
    if rows is not None:
        whole = [rows.put_heads(x) for x in (queries_BHTc, *keys[1:], *values[1:])]
        later = iter(whole[1:])
        keys, values = [keys[0], *(next(later) for _ in keys[1:])], [values[0], *later]
        return rows.take_heads(attend_levels(whole[0], keys, values, scale))
    if alone:
        return scaled_dot_product_attention(
            queries_BHTc, keys[0], values[0], is_causal=True, scale=scale, enable_gqa=True
        )
    mask = block_mask(queries_BHTc.shape[2], len(keys), queries_BHTc.device)
    return _compiled(flex_attention)(
        queries_BHTc,
        torch.cat(keys, dim=2),
        torch.cat(values, dim=2),
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
    )


def fused(queries_BHTc: Tensor) -> bool:
    """Whether a fused causal kernel takes these queries and gives the log-sum-exps of its rows."""
    if queries_BHTc.device.type == "cpu":
        return True
    half = queries_BHTc.dtype in (torch.float16, torch.bfloat16)
    return queries_BHTc.is_cuda and half and queries_BHTc.shape[-1] % 8 == 0


@lru_cache(maxsize=32)
def block_mask(rows: int, levels: int, device: torch.device) -> BlockMask:
    """`visible` for the last level's queries; key i stands at row i % T of level i // T."""

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(query, levels - 1, key % rows, key // rows)

    # Compiled, the empty blocks are found without a [T, K*T] mask.
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, None, None, rows, levels * rows, device=device)


@lru_cache(maxsize=2)
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


class _JoinedLevels(torch.autograd.Function):
    """One softmax over causal keys (level 0) and one key of the same row from each later level.

    With s_0 the log-sum-exp of a row's causal scores and s_j = scale q k_j, the row's weights are
    exp(s_j - s), s = logsumexp(s_0, ..., s_K). The backward pass of a fused attention needs only
    the final output and s to make the gradients of its part, so the causal kernel of PyTorch is
    run with those of the whole row. Nothing is kept but the inputs, the output and s.

    Where the causal kernel wants every row, those that are not computed stand there with queries of
    zeros, outputs of zeros and no gradient: nothing of them reaches a key.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        levels: int,
        rows: ComputedRows | None,
        queries_BHTc: Tensor,
        *both: Tensor,
    ) -> Tensor:
        keys, values = both[:levels], both[levels:]
        at_BP = None
        if rows is not None and in_blocks(queries_BHTc):
            rows, at_BP = rows.packed
        q = queries_BHTc if rows is None else rows.put_heads(queries_BHTc)
        causal_BHTc, lse_BHT, extra = causal(q, keys[0], values[0], scale, at_BP)
        if rows is not None:
            causal_BHTc, lse_BHT = rows.take_heads(causal_BHTc), rows.take_heads(lse_BHT)
        queries = _grouped(queries_BHTc, keys[0])
        scores = [_scores(queries, key_BGTc, scale) for key_BGTc in keys[1:]]
        lse = _grouped(lse_BHT, keys[0])
        joined = torch.stack([lse, *scores]).logsumexp(0)
        out = _grouped(causal_BHTc, keys[0]) * (lse - joined).exp()[..., None]
        for score, value_BGTc in zip(scores, values[1:], strict=True):
            out += (score - joined).exp()[..., None] * value_BGTc[:, :, None]
        out_BHTc = out.flatten(1, 2).to(queries_BHTc.dtype)
        ctx.scale, ctx.levels, ctx.rows, ctx.extra = scale, levels, rows, extra
        ctx.save_for_backward(queries_BHTc, out_BHTc, joined, *both)
        return out_BHTc

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        queries_BHTc, out_BHTc, joined, *both = ctx.saved_tensors
        keys, values, rows = both[: ctx.levels], both[ctx.levels :], ctx.rows
        dout_BHTc = outer[0]
        ours = (dout_BHTc, queries_BHTc, out_BHTc, joined.flatten(1, 2))
        dout, q, out, lse = ours if rows is None else map(rows.put_heads, ours)
        given = (dout, q, keys[0], values[0], out, lse)
        dq, dk, dv = causal_backward(given, ctx.extra, ctx.scale)
        if rows is not None:
            dq = rows.take_heads(dq)
        queries, dout = _grouped(queries_BHTc, keys[0]), _grouped(dout_BHTc, keys[0])
        # Softmax: ds = weight (dweight - delta), with delta the same for all keys of a row.
        delta = _scores(dout, _grouped(out_BHTc, keys[0]), 1.0)
        dqueries = _grouped(dq, keys[0])
        dkeys, dvalues = [dk], [dv]
        for key_BGTc, value_BGTc in zip(keys[1:], values[1:], strict=True):
            weight = (_scores(queries, key_BGTc, ctx.scale) - joined).exp()
            dscore = weight * (_scores(dout, value_BGTc, 1.0) - delta) * ctx.scale
            dqueries = dqueries + dscore[..., None] * key_BGTc[:, :, None]
            dkeys.append((dscore[..., None] * queries).sum(2).to(key_BGTc.dtype))
            dvalues.append((weight[..., None] * dout).sum(2).to(value_BGTc.dtype))
        return None, None, None, dqueries.flatten(1, 2).to(queries_BHTc.dtype), *dkeys, *dvalues


def _grouped(x: Tensor, keys_BGTc: Tensor) -> Tensor:
    """`[B, H, ...]` -> `[B, G, R, ...]`: query heads beside the key head they share."""
    return x.unflatten(1, (keys_BGTc.shape[1], -1))


def _scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Dot products row by row, fp32 (or fp64): `[B, G, R, T, c]` -> `[B, G, R, T]`."""
    keys = keys if keys.dim() == queries.dim() else keys[:, :, None]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return (queries * keys).sum(-1, dtype=dtype) * scale
