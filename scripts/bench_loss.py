"""Time and memory of the loss over a vocabulary, from states to gradients: chunked and plain.

python -m scripts.bench_loss                                  a short table
python -m scripts.bench_loss --sizes 576x49152x1024           hidden x vocabulary x positions
python -m scripts.bench_loss --losses jsd lk_lambda --heads frozen
python -m scripts.bench_loss --device cuda --sizes 4096x151936x8192
python -m scripts.bench_loss --plot docs/images/loss_scaling.png      both axes, for a figure
python -m scripts.bench_loss --peer <python with speculators 0.9>     its loss beside ours

What is measured: draft states, a draft head and the target's last hidden states and head go in; the
loss and the gradients of states and (trained) head come out. One repetition is the forward and the
backward pass. Counted as memory: the highest use while that runs, less what was there before
(inputs: states, both matrices, labels) and less the returned gradients. On a CPU it is the resident
set, whose mark the system resets before a measurement; on an accelerator the allocator's count.
Every measurement runs in a process of its own.

The peer's eager losses (its fused ones need an accelerator) take the logits of draft and target as
given. Beside the row that counts as ours, projections included, its own count is printed: from
given logits to the gradient of the draft's, that gradient included.

Time is wall-clock and, beside it on a CPU, processor seconds, which other programs disturb less;
the fastest of the repetitions counts.

Shape legend: T positions, d hidden size, V vocabulary.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import conf
from conf.check import build
from conf.console import console, say
from models.drafter.base import Depth
from models.head import Head
from models.head.frozen import FrozenHead
from models.head.own import OwnHead
from scripts.peak import measured
from train.chunked import chunked_loss, plain_loss
from train.lesson import Lesson
from train.losses import TargetLogits
from train.walk import rows_per_chunk

WAYS = ("chunked", "plain")
HEADS = ("frozen", "trained")
PRECISIONS = {"bf16": torch.bfloat16, "bf16-mixed": torch.float32, "float32": torch.float32}
"""Of states and a trained head; the target's matrix is bf16 unless all is float32."""


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    loss: str
    head: str
    way: str
    hidden: int
    vocab: int
    positions: int
    precision: str = "bf16"
    device: str = "cpu"
    repeats: int = 2


class RandomTarget(FrozenHead):
    """A target's head with random rows; projects as train.teacher.Teacher does."""

    def __init__(self, weight_Vd: Tensor) -> None:
        super().__init__(hidden_size=weight_Vd.shape[1], vocab_size=weight_Vd.shape[0])
        self._rows = [weight_Vd]

    @torch.no_grad()
    def rows(self, final_nd: Tensor, logz_n: Tensor | None) -> TargetLogits:
        """The logits of the whole vocabulary."""
        with torch.autocast(final_nd.device.type, enabled=False):
            return TargetLogits(F.linear(final_nd, self._rows[0]), logz_n)


def prepare(case: Case) -> Callable[[], list[Tensor]]:
    """The inputs, and what runs on them: returns the gradients."""
    torch.manual_seed(0)
    where = torch.device(case.device)
    dtype = PRECISIONS[case.precision]
    target_dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
    T, d, V = case.positions, case.hidden, case.vocab
    target = RandomTarget(_matrix(V, d, target_dtype, where))
    head: Head = target
    if case.head == "trained":
        with torch.device("meta"):
            head = OwnHead(hidden_size=d, vocab_size=V)
        head.linear.weight = torch.nn.Parameter(_matrix(V, d, dtype, where))
    # One more token than positions: the last one is a label only.
    states_BTd = torch.randn(1, T + 1, d, dtype=dtype, device=where).requires_grad_()
    lesson = Lesson(
        shape=(1, T + 1),
        index_U=torch.arange(T, device=where),
        label_U=torch.randint(0, V, (T,), device=where),
        final_Ud=torch.randn(T, d, dtype=target_dtype, device=where),
        logz_U=None,
    )
    file = Path(conf.__file__).parent / "loss" / f"{case.loss}.yaml"
    common: dict[str, Any] = {
        "depths": [Depth(states_BTd, head, shift=0)],
        "lesson": lesson,
        "loss": build(OmegaConf.load(file)),
        "projection": target,
        "depth_decay": 1.0,
    }
    inputs = [states_BTd, *head.parameters()]

    def once() -> list[Tensor]:
        with torch.autocast(where.type, torch.bfloat16, enabled=case.precision == "bf16-mixed"):
            if case.way == "chunked":
                sums = chunked_loss(chunk_rows=rows_per_chunk(V), **common)
            else:
                sums = plain_loss(**common)
        return list(torch.autograd.grad(sums.total / T, inputs))

    return once


def _matrix(V: int, d: int, dtype: torch.dtype, where: torch.device) -> Tensor:
    """Random rows made without an fp32 copy of the whole."""
    weight_Vd = torch.empty(V, d, dtype=dtype, device=where)
    for part in weight_Vd.split(8192):
        part.copy_(torch.randn(part.shape, device=where).mul_(d**-0.5))
    return weight_Vd


def measure(case: Case) -> dict[str, float]:
    """Seconds of one repetition, and MB beyond inputs and returned gradients."""
    # Threads, code and buffers of the libraries are there before the inputs.
    prepare(replace(case, vocab=512, positions=64))()
    return measured(prepare(case), case.device, case.repeats)


# --- many measurements ----------------------------------------------------------------------------


def in_new_process(case: Case) -> dict[str, Any]:
    """One measurement in a fork: what is imported is there, and nothing has run yet."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(measure(case)))
    child.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:  # it ended without an answer
        found = {}
    child.join()
    if not found:
        say(f"failed (exit code {child.exitcode}; -9: memory ran out)")
        return {}
    return asdict(case) | found


def by_peer(python: Path, case: Case) -> dict[str, Any]:
    """The same case by the other library, in its own environment."""
    line = [str(python), "-m", "scripts.bench_peer", "--one", json.dumps(asdict(case))]
    root = Path(__file__).parents[1]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"failed (exit code {done.returncode}; -9: memory ran out): {last}")
        return {}
    return asdict(case) | json.loads(done.stdout.splitlines()[-1])


def _size(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no hidden x vocabulary x positions")
    d, V, T = map(int, found.groups())
    return d, V, T


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_loss", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    sizes = [(576, 49152, 256), (576, 49152, 1024)]
    parser.add_argument("--sizes", type=_size, nargs="+", default=sizes, metavar="dxVxT")
    parser.add_argument("--losses", nargs="+", default=["forward_kl"], help="files of conf/loss")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="draw the sizes as a PNG")
    parser.add_argument("--peer", type=Path, help="python of an environment with speculators")
    parser.add_argument("--out", type=Path, default=Path("bench_loss.json"))
    return parser


def main() -> None:
    """Measure every combination, print a table, write JSON and the plot."""
    args = _arguments().parse_args()
    results = []
    for size, loss, head in itertools.product(args.sizes, args.losses, args.heads):
        for way in [*args.ways, *(["peer"] if args.peer else [])]:
            hidden, vocab, positions = size
            case = Case(
                loss=loss,
                head=head,
                way=way,
                hidden=hidden,
                vocab=vocab,
                positions=positions,
                precision=args.precision,
                device=args.device,
                repeats=args.repeats,
            )
            say(f"measuring {loss}, {head} head, {'x'.join(map(str, size))}, {way} ...")
            results.append(by_peer(args.peer, case) if way == "peer" else in_new_process(case))
    results = [r for r in results if r]
    console.print(_table(results))
    about = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    about["threads"] = torch.get_num_threads()
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    temporary.replace(args.out)
    say(f"Written: {args.out}")
    if args.plot is not None:
        from scripts.loss_scaling import plot

        plot(results, args.plot)
        say(f"Written: {args.plot}")


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table("loss", "head", "d x V x T", "way", "s", "processor s", "MB beyond")
    for r in results:
        size = f"{r['hidden']} x {r['vocab']} x {r['positions']}"
        numbers = f"{r['seconds']:.2f}", f"{r['processor_seconds']:.2f}", f"{r['beyond_mb']:,.0f}"
        table.add_row(r["loss"], r["head"], size, r["way"], *numbers)
        if "region_mb" in r:
            note = f"{r['region_seconds']:.2f}", "", f"{r['region_mb']:,.0f}"
            table.add_row("", "", "", f"{r['way']}, its count", *note)
    return table


if __name__ == "__main__":
    main()
