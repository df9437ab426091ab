"""Time and memory of one training step of EAGLE-3 over unrolled steps and sequence length.

python -m scripts.bench_unroll                                   steps 1..7, T 512..4096
python -m scripts.bench_unroll --steps 3 7 --positions 512 1024 2048
python -m scripts.bench_unroll --device cuda --plot docs/images/unroll.png
python -m scripts.bench_unroll --turns 89 79                     answers behind prompts
python -m scripts.bench_unroll --peer <python with speculators 0.9>     its step beside ours

A step is what a run does with given features: the drafter unrolled under bf16 autocast, the chunked
loss, the backward pass, clipping and AdamW on fp32 weights. One sequence of T positions; logZ is
given, as feature shards hold it. The drafter has the shape of SmolLM2-135M and a head of its own
over the draft vocabulary. All positions are tokens to learn, or with `--turns 89 79` those of the
answers alone, after 89 tokens of a prompt 79 of an answer, and so on (89 and 79 are the means of
dataset=broad). Tokens/s count all positions.

Memory is the highest use while that runs, less what was there before (weights, the optimizer's
state, features) and less the gradients (scripts/peak.py); `process_mb` is the highest use of the
whole process. Every measurement runs in a process of its own; the fastest repetition counts. GFLOP
are those of matrix products and attention, forward and backward; a step cannot be faster than they
are at the rate of one large product, which is measured first.

Shape legend: B sequences, T positions, d hidden size, V vocabulary.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from conf.console import console, say
from decode.plot import BLUE, GREY, LINE, QUIET, SAND, TEAL, style
from models.device import keep_freed_memory
from models.drafter.eagle3 import Eagle3
from models.target import Features, Target
from scripts.peak import measured, multiplications, product_rate
from train.chunked import chunked_loss, make_lesson, rows_per_chunk
from train.losses import ForwardKL
from train.teacher import Teacher

COLOURS = (BLUE, TEAL, SAND, QUIET, GREY)


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    steps: int
    positions: int
    draft_vocab: int = 4096
    hidden: int = 576
    vocab: int = 49_152
    precision: str = "bf16-mixed"
    device: str = "cpu"
    repeats: int = 3
    turns: tuple[int, int] | None = None

    @property
    def learn_T(self) -> list[bool]:
        """Which positions are tokens to learn."""
        prompt, answer = self.turns or (0, 1)
        return [t % (prompt + answer) >= prompt for t in range(self.positions)]


def prepare(case: Case) -> Callable[[], list[Tensor]]:
    """The drafter and one batch; what runs returns the gradients."""
    torch.manual_seed(0)
    where = torch.device(case.device)
    target = _target(case, where)
    drafter = Eagle3(
        hidden_size=case.hidden,
        vocab_size=case.vocab,
        target_shape=target.layer_shape,
        steps=case.steps,
        draft_vocab_size=case.draft_vocab,
        head={"_target_": "models.head.own.OwnHead"},
    )
    drafter.bind(target).init_from(target)
    drafter.to(where).train()
    weights = list(drafter.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    for weight in weights:  # the optimizer's state exists before anything is measured
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    teacher = Teacher(target=target)
    teacher.set_vocab(drafter.draft_ids_D)

    T, d = case.positions, case.hidden
    tokens_BT = torch.randint(0, case.vocab, (1, T), device=where)

    def made() -> Tensor:
        return torch.randn(1, T, d, dtype=target.dtype, device=where)

    features = Features(made(), {k: made() for k in drafter.feature_layers})
    logz_BT = torch.full((1, T), 10.0, device=where)
    learn_BT = torch.tensor([case.learn_T], device=where)

    def once() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        mixed = case.precision == "bf16-mixed"
        with torch.autocast(where.type, torch.bfloat16, enabled=mixed):
            lesson = make_lesson(
                tokens_BT=tokens_BT,
                learn_BT=learn_BT,
                final_BTd=features.final_BTd,
                logz_BT=logz_BT,
                draft_ids_D=drafter.draft_ids_D,
                vocab_size=case.vocab,
            )
            given = features if mixed else features.to(drafter.dtype)
            sums = chunked_loss(
                depths=list(drafter.unroll_taught(given, tokens_BT, case.steps, lesson.taught_BT)),
                lesson=lesson,
                loss=ForwardKL(),
                projection=teacher,
                depth_decay=0.8,
                chunk_rows=rows_per_chunk(case.draft_vocab, case.steps, case.device),
            )
        (sums.total / len(lesson.index_U)).backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        return [weight.grad for weight in weights if weight.grad is not None]

    return once


def _target(case: Case, where: torch.device) -> Target:
    """A random target with SmolLM2-135M's layer; four of them are enough to name three."""
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=4,
        num_attention_heads=max(1, case.hidden // 64),
        num_key_value_heads=max(1, case.hidden // 192),
        max_position_embeddings=8192,
    )
    model: Any = LlamaForCausalLM(config)
    dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
    tokenizer: Any = None  # nothing here is text
    return Target(model=model.to(where, dtype), tokenizer=tokenizer, name="random")


def measure(case: Case) -> dict[str, float]:
    """Seconds of a step, tokens/s, and memory."""
    keep_freed_memory(torch.device(case.device))  # as training does
    # Threads, code and buffers of the libraries are there before the inputs.
    prepare(replace(case, positions=64, vocab=512, draft_vocab=256, turns=None))()
    once = prepare(case)
    found = measured(once, case.device, case.repeats)
    found["gflop"] = multiplications(once)
    found["tokens_per_second"] = case.positions / found["seconds"]
    found["process_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return found


def in_new_process(case: Case) -> dict[str, Any]:
    """One measurement in a process that has run nothing before."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return asdict(case) | pool.apply(measure, (case,))


def by_peer(python: Path, case: Case) -> dict[str, Any]:
    """The same case by the speculators library, in its own environment."""
    command = [str(python), "-m", "scripts.bench_unroll_peer", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--peer={python} did not measure:\n{done.stderr.strip()[-2000:]}")
    return asdict(case) | json.loads(done.stdout.splitlines()[-1])


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Memory and speed over the steps, one line a sequence length."""
    figure = Figure(figsize=(11.5, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _lines(left, results, "beyond_mb", 1.0)
    style(left, "Memory of a step", "MB beyond weights, optimizer, features and gradients")
    _lines(right, results, "seconds", 1e3)
    style(right, "Time of a step", "milliseconds a position, optimizer included")
    left.legend(frameon=False, fontsize=9.5, loc="upper left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def _lines(axes: Axes, results: list[dict[str, Any]], value: str, scale: float) -> None:
    lengths = sorted({r["positions"] for r in results})
    for T, colour in zip(lengths, itertools.cycle(COLOURS), strict=False):
        chosen = sorted((r["steps"], r[value]) for r in results if r["positions"] == T)
        # Time is divided by the positions, so that the lines compare; memory is not.
        share = T if value == "seconds" else 1
        y = [v * scale / share for _, v in chosen]
        axes.plot([s for s, _ in chosen], y, "o-", color=colour, label=f"T = {T:,}")
    axes.set_xlabel("unrolled steps", color=QUIET)
    axes.set_xticks(sorted({r["steps"] for r in results}))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table("way", "steps", "T", "tokens/s", "s", "GFLOP/s", "MB beyond", "MB process")
    for r in results:
        table.add_row(
            r["way"],
            str(r["steps"]),
            f"{r['positions']:,}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['seconds']:.2f}",
            f"{r['gflop'] / r['seconds']:,.0f}",
            f"{r['beyond_mb']:,.0f}",
            f"{r['process_mb']:,.0f}",
        )
    return table


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_unroll", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 5, 7])
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument(
        "--turns",
        type=int,
        nargs=2,
        metavar=("PROMPT", "ANSWER"),
        help="learn answers of so many tokens alone, each behind a prompt of so many",
    )
    parser.add_argument("--draft-vocab", type=int, default=4096)
    parser.add_argument("--precision", choices=["bf16-mixed", "float32"], default="bf16-mixed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="python of an environment with speculators")
    parser.add_argument("--plot", type=Path, help="draw both as a PNG")
    parser.add_argument("--out", type=Path, default=Path("bench_unroll.json"))
    return parser


def main() -> None:
    """Measure every combination, print a table, write JSON and the plot."""
    args = _arguments().parse_args()
    if args.peer is not None and (args.device, args.precision) != ("cpu", "bf16-mixed"):
        raise SystemExit("--peer runs on a CPU in bf16-mixed; leave --device and --precision.")
    prompt, answer = args.turns or (0, 1)
    if prompt < 0 or answer < 1 or prompt + 1 >= min(args.positions):
        raise SystemExit(
            f"--turns {prompt} {answer} must be a prompt of at least 0 and an answer of at least 1 "
            f"token that begins within the {min(args.positions)} positions, because a step learns "
            "the answers; give other lengths, or leave --turns out to learn every token."
        )
    rate = product_rate(args.device)
    say(f"One large bf16 product runs at {rate:,.0f} GFLOP/s here.")
    results = []
    for T, steps in itertools.product(args.positions, args.steps):
        case = Case(
            steps=steps,
            positions=T,
            draft_vocab=args.draft_vocab,
            precision=args.precision,
            device=args.device,
            repeats=args.repeats,
            turns=args.turns and tuple(args.turns),
        )
        say(f"measuring {steps} steps, T = {T:,} ...")
        results.append({"way": "ours"} | in_new_process(case))
        if args.peer is not None:
            results.append({"way": "speculators"} | by_peer(args.peer, case))
    console.print(_table(results))
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    about |= {"threads": torch.get_num_threads(), "product_gflop_per_second": rate}
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    temporary.replace(args.out)
    say(f"Written: {args.out}")
    if args.plot is not None:
        plot([r for r in results if r["way"] == "ours"], args.plot)
        say(f"Written: {args.plot}")


if __name__ == "__main__":
    main()
