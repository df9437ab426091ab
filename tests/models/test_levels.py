"""Attention over levels: the pattern, the joined softmax, and the blocks of a GPU.

Shape legend: B sequences, T positions, H query heads, G key heads, c head size, K levels.
"""

import pytest
import torch
from torch import Tensor

import models.levels as levels_module
from models.computed import ComputedRows
from models.levels import Levels, attend_levels, block_mask, visible


def _random(K: int, T: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Queries of the last level, then the keys and the values of all levels."""
    torch.manual_seed(0)
    B, H, G, c = 2, 6, 2, 8
    tensors = [torch.randn(B, H if i == 0 else G, T, c, dtype=dtype) for i in range(1 + 2 * K)]
    for tensor in tensors:
        tensor.requires_grad_()
    return tensors[0], tensors[1:]


def _dense(queries: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """The definition: every score of every level, hidden ones at -inf, one softmax."""
    K, T = len(keys), queries.shape[2]
    device = queries.device
    row, key = torch.arange(T, device=device)[:, None], torch.arange(K * T, device=device)[None]
    seen = visible(row, K - 1, key % T, key // T)
    repeat = queries.shape[1] // keys[0].shape[1]
    k = torch.cat(keys, dim=2).repeat_interleave(repeat, dim=1)
    v = torch.cat(values, dim=2).repeat_interleave(repeat, dim=1)
    scores = (queries @ k.mT * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def _same_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    outer = torch.randn_like(expected)
    ours = torch.autograd.grad(found, inputs, outer)
    theirs = torch.autograd.grad(expected, inputs, outer)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_pattern_of_a_small_case() -> None:
    """Row 1 of 3 at level 2 sees verified rows 0 and 1, and itself at levels 1 and 2."""
    seen = [[bool(visible(1, 2, row, level)) for row in range(3)] for level in range(4)]
    assert seen == [
        [True, True, False],
        [False, True, False],
        [False, True, False],
        [False, False, False],  # a level after the query's own
    ]


@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_equals_the_dense_softmax_gradients_too(K: int) -> None:
    queries, both = _random(K)
    found = attend_levels(queries, both[:K], both[K:], 0.3)
    expected = _dense(queries, both[:K], both[K:], 0.3)
    _same_with_gradients(found, expected, [queries, *both])


ROWS = ComputedRows((2, 11), torch.tensor([0, 3, 4, 10, 12, 19, 20]))


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "scattered"])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_some_rows_read_what_they_would_among_all(
    K: int, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and later keys of seven of 22 rows; gradients as if nobody looked at the others."""
    if not joined:  # as an accelerator does without a kernel to join: put back, all rows, taken out
        monkeypatch.setattr(levels_module, "fused", lambda _: False)
        monkeypatch.setattr(levels_module, "_compiled", lambda _: _dense_blocks)
    queries, both = _random(K)
    expected = ROWS.take_heads(_dense(queries, both[:K], both[K:], 0.3))
    some = [x if i in (0, K) else ROWS.take_heads(x) for i, x in enumerate(both)]
    found = attend_levels(ROWS.take_heads(queries), some[:K], some[K:], 0.3, ROWS)
    _same_with_gradients(found, expected, [queries, *both])


def _dense_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: object, scale: float, enable_gqa: bool
) -> Tensor:
    """What flex_attention computes, in fp64 too."""
    assert block_mask is not None
    assert enable_gqa
    T = q.shape[2]
    return _dense(q, list(k.split(T, dim=2)), list(v.split(T, dim=2)), scale)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_bf16_is_as_near_as_bf16_can_be(some: bool) -> None:
    queries, both = _random(4, T=200, dtype=torch.float32)
    expected = _dense(queries, both[:4], both[4:], 0.3)
    small = [t.detach().bfloat16().requires_grad_() for t in (queries, *both)]
    if some:
        rows = ComputedRows((2, 200), torch.cat([torch.arange(90, 200), torch.arange(230, 333)]))
        expected = rows.take_heads(expected)
        q, *kv = (x if i in (1, 5) else rows.take_heads(x) for i, x in enumerate(small))
        found = attend_levels(q, kv[:4], kv[4:], 0.3, rows)
    else:
        found = attend_levels(small[0], small[1:5], small[5:], 0.3)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).detach().abs().max()) < 0.03
    outer = torch.randn_like(expected)
    ours = torch.autograd.grad(found, small, outer.bfloat16())
    theirs = torch.autograd.grad(expected, [queries, *both], outer)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.015


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("K", [2, 4])
def test_the_blocks_of_flex_attention_are_the_same_pattern(K: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    queries, both = _random(K, T=150, dtype=torch.float32)
    queries, both = queries.detach(), [t.detach() for t in both]
    mask = block_mask(150, K, torch.device("cpu"))
    with torch.no_grad():
        k, v = torch.cat(both[:K], dim=2), torch.cat(both[K:], dim=2)
        found = flex_attention(queries, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
        expected = _dense(queries, both[:K], both[K:], 0.3)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_of_size_levels_times_positions_squared_is_kept() -> None:
    """What the backward pass keeps of a level: its own queries, keys, values, output and sums."""
    T, kept = 256, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        levels = Levels()
        for _ in range(5):
            queries, (keys, values) = _random(1, T=T)
            levels.update(keys, values)
            levels.attend(queries, 0.3)
    assert max(t.numel() for t in kept) == 2 * 6 * T * 8  # [B, H, T, c]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the first use of a kernel may advise something
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float32, 2e-3)], ids=["joined", "flex"]
)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_an_accelerator_gives_the_dense_softmax(
    K: int, some: bool, dtype: torch.dtype, error: float
) -> None:
    """Joined in half precision, flex_attention in fp32: values and gradients of the definition."""
    torch.manual_seed(0)
    given = [
        torch.randn(2, 9 if i == 0 else 3, 150, 64, device="cuda", requires_grad=True)
        for i in range(1 + 2 * K)
    ]
    expected = _dense(given[0], given[1 : 1 + K], given[1 + K :], 0.125)
    small = [t.detach().to(dtype).requires_grad_() for t in given]
    rows, (q, *kv) = None, small
    if some:
        rows = ComputedRows((2, 150), torch.arange(40, 290, 3, device="cuda"))
        expected = rows.take_heads(expected)
        q, *kv = (x if i in (1, 1 + K) else rows.take_heads(x) for i, x in enumerate(small))
    outer = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, given, outer)
    found = attend_levels(q, kv[:K], kv[K:], 0.125, rows)
    ours = torch.autograd.grad(found, small, outer.to(dtype))
    for a, b in zip([found, *ours], [expected, *theirs], strict=True):
        difference = (a.float() - b).norm() / b.norm()
        assert float(difference) < error, difference
