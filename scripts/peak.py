"""Time and memory of a function that returns gradients; needs torch and the standard library alone.

It runs in the environments of other libraries too (scripts/bench_peer.py).
"""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def measured(once: Callable[[], list[Tensor]], device: str, repeats: int) -> dict[str, float]:
    """The fastest repetition, and the memory of the first beyond what it returns."""
    gc.collect()
    before = _reset_peak(device)
    seconds, processor = [], []
    peak = returned = 0.0
    for i in range(repeats):
        wall, own = time.perf_counter(), time.process_time()
        gradients = once()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - own)
        if i == 0:
            peak = _peak(device)
            returned = sum(g.numel() * g.element_size() for g in gradients) / 2**20
        del gradients
    return {
        "seconds": min(seconds),
        "processor_seconds": min(processor),
        "beyond_mb": peak - before - returned,
        "returned_mb": returned,
    }


def multiplications(once: Callable[[], list[Tensor]]) -> float:
    """GFLOP of the matrix products and attention of one call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        once()
    return counter.get_total_flops() / 1e9


def product_rate(device: str, size: int = 2048, seconds: float = 2.0) -> float:
    """GFLOP/s of one large bf16 matrix product: what this machine's products run at, at best."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest / 1e9


def _reset_peak(device: str) -> float:
    """Forget the highest use so far; MB in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that using it again is seen
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM")


def _status(key: str) -> float:
    """A number of /proc/self/status, in MB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "memory is read from /proc, which needs Linux"
    return int(found.group(1)) / 2**10
