"""Speed and peak memory of the loss over a full vocabulary, chunked and not.

python -m scripts.bench_loss                        three sizes, a table, bench_loss.json
python -m scripts.bench_loss --positions 512 4096   other sizes
python -m scripts.bench_loss --device cuda          on an accelerator: its own peak memory

Heads (a vocabulary matrix each) learn from the target's distribution with the forward KL; one
repetition is forward and backward of the loss down to the gradients of states and matrices. Each
measurement runs in a process of its own, because the peak memory of a process never falls.

Shape legend: U positions, d hidden size, V vocabulary, K depths.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from conf.console import console, say
from models.drafter.base import Depth
from models.head.own import OwnHead
from models.target import has_fast_bf16
from train.chunked import Lesson, chunked_loss, plain_loss, rows_per_chunk
from train.losses import ForwardKL, TargetRows

WAYS = ("chunked", "unchunked")


class RandomTarget:
    """log p = log softmax(W f) with a random W: as costly as a real target's head."""

    def __init__(self, weight_Vd: Tensor) -> None:
        self.weight_Vd = weight_Vd

    @torch.no_grad()
    def rows(self, final_nd: Tensor, logz_n: Tensor | None) -> TargetRows:
        """log p over the whole vocabulary."""
        assert logz_n is None
        with torch.autocast(final_nd.device.type, enabled=False):
            return TargetRows(F.linear(final_nd, self.weight_Vd).float().log_softmax(-1))


def measure(
    *, way: str, positions: int, vocab: int, hidden: int, depths: int, chunk: int, repeats: int,
    device: str,
) -> dict[str, float]:  # fmt: skip
    """Positions per second (all depths done) and memory in MB, of this process."""
    torch.manual_seed(0)
    where = torch.device(device)
    bf16 = has_fast_bf16(where)
    dtype = torch.bfloat16 if bf16 else torch.float32
    # One more token than positions: the last one is a label only.
    tokens_U = torch.randint(0, vocab, (positions,), device=where)
    lesson = Lesson(
        shape=(1, positions + 1),
        index_U=torch.arange(positions, device=where),
        label_U=tokens_U,
        final_Ud=torch.randn(positions, hidden, dtype=dtype, device=where),
        logz_U=None,
    )
    target = RandomTarget(torch.randn(vocab, hidden, dtype=dtype, device=where) * 0.05)
    heads = [OwnHead(hidden_size=hidden, vocab_size=vocab).to(where) for _ in range(depths)]
    states = [
        torch.randn(1, positions + 1, hidden, device=where, requires_grad=True) for _ in heads
    ]
    common: dict[str, Any] = {
        "lesson": lesson, "loss": ForwardKL(), "projection": target, "depth_decay": 1.0
    }  # fmt: skip

    def once() -> None:
        for tensor in [*states, *(p for head in heads for p in head.parameters())]:
            tensor.grad = None
        unrolled = [Depth(s, head, shift=0) for s, head in zip(states, heads, strict=True)]
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            if way == "chunked":
                sums = chunked_loss(depths=unrolled, chunk_rows=chunk, **common)
            else:
                sums = plain_loss(depths=unrolled, **common)
        (sums.total / positions).backward()
        if where.type == "cuda":
            torch.cuda.synchronize()

    before = _peak_mb(where)
    once()
    start = time.perf_counter()
    for _ in range(repeats):
        once()
    seconds = (time.perf_counter() - start) / repeats
    peak = _peak_mb(where)
    return {
        "tokens_per_s": positions / seconds,
        "peak_mb": peak,
        "above_start_mb": peak - before,
    }


def _peak_mb(device: torch.device) -> float:
    """Peak memory so far: of the device, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_loss", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=rows_per_chunk(49152))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench_loss.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure every size both ways, print a table, write JSON."""
    args = _arguments().parse_args()
    fixed = {
        k: getattr(args, k) for k in ("vocab", "hidden", "depths", "chunk", "repeats", "device")
    }
    if args.one is not None:
        result = measure(way=args.one, positions=args.positions[0], **fixed)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    say(
        f"{args.depths} heads of {args.vocab:,} x {args.hidden}, forward KL, chunks of "
        f"{args.chunk} positions, {torch.get_num_threads()} threads on {args.device}."
    )
    results = []
    for positions in args.positions:
        for way in WAYS:
            say(f"measuring {positions} positions, {way} ...")
            results.append(
                {"positions": positions, "way": way} | _in_new_process(way, positions, fixed)
            )
    memory = "peak RSS" if args.device == "cpu" else "peak memory"
    table = Table("positions", "loss", "tokens/s", memory, "above the start", title="make bench")
    for r in results:
        numbers = (
            f"{r['tokens_per_s']:,.0f}",
            f"{r['peak_mb']:,.0f} MB",
            f"{r['above_start_mb']:,.0f} MB",
        )
        table.add_row(f"{r['positions']:,}", r["way"], *numbers)
    console.print(table)
    about = fixed | {"torch": torch.__version__, "machine": platform.machine()}
    about["threads"] = torch.get_num_threads()
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    temporary.replace(args.out)
    say(f"Written: {args.out}")


def _in_new_process(way: str, positions: int, fixed: dict[str, Any]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "scripts.bench_loss",
        "--one",
        way,
        "--positions",
        str(positions),
    ]
    for name, value in fixed.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{way} with {positions} positions failed (exit status {done.returncode}; -9 means "
            f"that memory ran out): {done.stderr.strip()[-400:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
