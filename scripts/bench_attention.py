"""Causal attention of training on a CPU in bf16: blocks (models/causal.py) beside PyTorch's kernel.

python -m scripts.bench_attention
python -m scripts.bench_attention --positions 512 4096 --heads 32 8 128     queries, keys, head size

Milliseconds of the forward and the backward pass, fastest of some; the error is that of the
gradient of the queries, root mean square, beside fp64.

Shape legend: T positions, H query heads, G key heads, c head size.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from conf.console import console, say
from models import causal as attention


def fastest(function: Callable[[], object], repeats: int) -> float:
    """Milliseconds."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken[1:]) * 1e3


def row(T: int, heads: tuple[int, int, int], repeats: int) -> list[str]:
    """One length: both ways, forward + backward ms and error."""
    H, G, c = heads
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, T, n, c).bfloat16().transpose(1, 2) for n in (H, G, G, H))
    scale = c**-0.5
    exact_q = q.double().requires_grad_()
    out = scaled_dot_product_attention(
        exact_q, k.double(), v.double(), is_causal=True, scale=scale, enable_gqa=True
    )
    (exact_dq,) = torch.autograd.grad(out, exact_q, dout.double())
    cells = []
    try:
        for attention.IN_BLOCKS in (True, False):
            out, lse, extra = attention.causal(q, k, v, scale)
            given = (dout, q, k, v, out, lse)
            dq, _, _ = attention.causal_backward(given, extra, scale)
            error = float((dq.double() - exact_dq).norm() / exact_dq.norm())
            forward = fastest(partial(attention.causal, q, k, v, scale), repeats)
            backward = fastest(partial(attention.causal_backward, given, extra, scale), repeats)
            cells += [f"{forward:.1f} + {backward:.1f}", f"{error:.2%}"]
    finally:
        attention.IN_BLOCKS = True
    return [f"{T:,}", *cells]


def main() -> None:
    """Measure every length and print a table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_attention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    say(f"bf16 on {torch.get_num_threads()} threads, H, G, c = {args.heads}")
    table = Table("T", "blocks: ms", "error", "kernel: ms", "error")
    for T in args.positions:
        table.add_row(*row(T, tuple(args.heads), args.repeats))
    console.print(table)


if __name__ == "__main__":
    main()
