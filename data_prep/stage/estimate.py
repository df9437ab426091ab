"""What a dataset will cost, from a short measured probe, before anything is written."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from conf.console import say
from data_prep.conversation import stable_hash
from data_prep.generate import Answer, Generator, Request
from data_prep.progress import clock
from data_prep.shards import Example
from data_prep.signal import Sampled, Signal, SignalRows, TopK, packed_bytes, teaches
from data_prep.stage.capture import Capture, compute, signal_of
from data_prep.stage.respond import to_example
from models.target import Target

PROBE_ROWS = 32
PROBE_STEPS = 8
PROBE_CAPTURE_TOKENS = 2048
PROBE_SIGNAL_TOKENS = 8192
BYTES_PER_TOKEN = 16
"""Token shards, journal and the prompts' text together, rounded up."""
COMPARED: tuple[Signal, ...] = (TopK(k=16), TopK(k=64), Sampled(draws=50))
"""Signals whose cost is printed beside the one asked for."""
RESERVE = 64 * 2**20
"""Room that must stay free beside the dataset."""


@dataclass(frozen=True)
class Speed:
    """Measured on this machine just now; `step_seconds` is one token for each of `rows` prompts.

    `answered` are those prompts with the few tokens of their answers.
    """

    prefill_tokens_per_second: float
    step_seconds: float
    rows: int
    answered: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class TeacherCost:
    """What a kind of teacher keeps on disk.

    `per_position` is bytes: of a position that teaches for a signal, of any position for features.
    """

    name: str
    per_position: float
    bytes: float
    remark: str


@dataclass(frozen=True)
class Estimate:
    """`answer_tokens` and all that follows from it are upper bounds: answers may end earlier.

    `taught` counts tokens to learn, answers or not. `teachers` compares kinds of teachers, when
    asked for. `elsewhere`: a server answers, whose time `respond_seconds` does not hold.
    """

    prompts: int
    prompt_tokens: int
    answer_tokens: int
    taught: int
    token_bytes: int
    capture_bytes: int
    respond_seconds: float
    capture_seconds: float
    free_bytes: int
    teachers: list[TeacherCost] = field(default_factory=list)
    elsewhere: bool = False

    @property
    def bytes(self) -> int:
        return self.token_bytes + self.capture_bytes

    @property
    def seconds(self) -> float:
        return self.respond_seconds + self.capture_seconds

    def say(self) -> None:
        say(
            f"  tokens    {self.prompts:,} prompts with {self.prompt_tokens:,} tokens, "
            f"at most {self.answer_tokens:,} answer tokens"
        )
        say(
            f"  disk      at most {self.bytes / 1e9:.3g} GB "
            f"(captured {self.capture_bytes / 1e9:.3g} GB); free {self.free_bytes / 1e9:.1f} GB"
        )
        answering = "(without the server's) " if self.elsewhere else ""
        say(
            f"  time      at most {self.seconds / 3600:.2f} hours: answering {answering}"
            f"{clock(self.respond_seconds)}, capturing {clock(self.capture_seconds)} "
            "(measured just now on this machine)"
        )
        if not self.teachers:
            return
        say("  teachers  bytes a token, bytes a token to learn, and all")
        tokens = max(1, self.prompt_tokens + self.answer_tokens)
        for cost in self.teachers:
            say(
                f"    {cost.name:12} {cost.bytes / tokens:9,.1f} "
                f"{cost.bytes / max(1, self.taught):9,.1f} {cost.bytes / 1e9:9.3g} GB  "
                f"{cost.remark}"
            )

    def refuse_without_room(self, folder: Path) -> None:
        """Raises ValueError when the disk cannot hold what would be written."""
        if self.bytes + RESERVE > self.free_bytes:
            raise ValueError(
                f"The dataset may need {self.bytes / 1e9:.3g} GB and {RESERVE / 1e9:.3g} GB in "
                f"reserve, but the disk of {folder} has {self.free_bytes / 1e9:.3g} GB free; free "
                "some room, choose another dataset.root, or capture less (dataset.capture)."
            )


def estimate(
    *,
    target: Target,
    folder: Path,
    answer: tuple[Generator, Sequence[Request]] | None,
    write: Sequence[Request] = (),
    examples: Sequence[Example] = (),
    conversations: int = 0,
    capture: Capture | None,
    compare: bool = False,
    elsewhere: bool = False,
) -> Estimate:
    """The cost of answering the requests of `answer` (or of `examples` that are there).

    `write` are prompts the target writes itself before; `compare` asks for `Estimate.teachers`.
    `elsewhere` leaves out the time of answering: a server does it.
    """
    requests = list(answer[1]) if answer else []
    prompt_tokens = sum(len(r.tokens) for r in requests) + sum(len(e.tokens) for e in examples)
    answer_tokens = sum(r.max_new_tokens for r in requests)
    taught = answer_tokens + sum(int(e.learn[1:].sum()) for e in examples)
    seconds = 0.0
    generator = answer[0] if answer else Generator(target=target)
    batches = generator.batches([*write] if elsewhere else [*requests, *write])
    probe = sorted(examples, key=lambda e: stable_hash(e.id))  # of all sources alike
    if batches:
        speed = measure(generator, batches[len(batches) // 2])
        probe = speed.answered
        seconds = sum(batch_seconds(batch, speed) for batch in batches)
    total = prompt_tokens + answer_tokens
    asked = capture.signal if capture else None
    signals = [asked] if asked else []
    if compare:
        signals += [s for s in COMPARED if s.name not in {a.name for a in signals}]
    costs = signal_costs(target, signals, probe, taught) if signals else []
    captured = float(costs[0].bytes) if asked else 0.0
    if capture and capture.features:
        captured += total * capture.feature_bytes(target)
    return Estimate(
        prompts=len(requests) or conversations,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        taught=taught,
        token_bytes=total * BYTES_PER_TOKEN,
        capture_bytes=round(captured),
        respond_seconds=seconds,
        capture_seconds=total * _capture_rate(target, capture, taught / total)
        if capture and total
        else 0.0,
        free_bytes=free_bytes(folder),
        teachers=[*_whole(target, capture, total), *costs] if compare else [],
        elsewhere=elsewhere,
    )


def _whole(target: Target, capture: Capture | None, total: int) -> list[TeacherCost]:
    """The teachers that know all of p."""
    features = capture if capture and capture.features else Capture()
    each = features.feature_bytes(target)
    layers = f" and {len(features.layers)} inner layers" if features.layers else ""
    return [
        TeacherCost("online", 0.0, 0.0, "the target runs in every step"),
        TeacherCost(
            "features", each, each * total, f"{features.dtype}, all positions: f, logZ{layers}"
        ),
    ]


@torch.inference_mode()
def signal_costs(
    target: Target, signals: Sequence[Signal], probe: Sequence[Example], taught: int
) -> list[TeacherCost]:
    """Bytes of signals from what they keep of a few examples, or else of the most they can keep.

    The error printed is one standard error, of examples: positions of one are alike.
    """
    kept: list[list[SignalRows]] = [[] for _ in signals]
    tokens = 0
    for example in probe:
        tokens += len(example.tokens)
        if tokens > PROBE_SIGNAL_TOKENS and kept[0]:
            break
        features = target.forward(example.tokens[None].to(target.device))
        final_nd = features.final_BTd[0, teaches(example.learn)]
        for rows, signal in zip(kept, signals, strict=True):
            rows.append(signal_of(target, final_nd, signal, example.id))
    costs = []
    for rows, signal in zip(kept, signals, strict=True):
        # Without examples, of a p that is the same everywhere: nothing is kept in fewer bytes.
        flat_NV = torch.zeros(1, target.vocab_size)
        joined = SignalRows.join(rows or [signal.take(flat_NV, torch.Generator())])
        mean = float((joined.ids_NK >= 0).sum()) / max(1, len(joined))
        off = [float((r.ids_NK >= 0).sum()) - mean * len(r) for r in rows]
        error = sum(o * o for o in off) ** 0.5 / max(1, len(joined))
        measured = f" +- {error:.1f} on {len(joined):,} of them" if rows else " at most"
        each = packed_bytes(joined, target.vocab_size)
        remark = f"{mean:.1f} ids a position{measured}"
        costs.append(TeacherCost(signal.name, each, each * taught, remark))
    return costs


def measure(generator: Generator, batch: Sequence[Request]) -> Speed:
    """Answer (a part of) one batch with one new token, and with a few; the first call warms up."""
    rows = list(batch[:PROBE_ROWS])
    steps = min(PROBE_STEPS, max(r.max_new_tokens for r in rows))
    few = [replace(r, max_new_tokens=steps) for r in rows]
    _timed(generator, [replace(r, max_new_tokens=1) for r in rows[:4]])
    first = _timed(generator, [replace(r, max_new_tokens=1) for r in rows])[0]
    whole, answers = _timed(generator, few)
    made = max(len(a.tokens) for a in answers)
    step = (whole - first) / (made - 1) if made > 1 else first
    tokens = len(rows) * max(len(r.tokens) for r in rows)
    answered = [to_example(r, a, None) for r, a in zip(few, answers, strict=True)]
    return Speed(tokens / first, max(step, 1e-6), len(rows), answered)


def batch_seconds(batch: Sequence[Request], speed: Speed) -> float:
    """Prefill, then as many steps as the longest answer may have; more rows cost in proportion."""
    prefill = len(batch) * max(len(r.tokens) for r in batch) / speed.prefill_tokens_per_second
    step = speed.step_seconds * max(1.0, len(batch) / speed.rows)
    return prefill + max(r.max_new_tokens for r in batch) * step


def free_bytes(folder: Path) -> int:
    """Free room on the disk where `folder` is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _timed(generator: Generator, batch: Sequence[Request]) -> tuple[float, list[Answer]]:
    start = time.perf_counter()
    answers = generator.answer_batch(batch)
    return time.perf_counter() - start, answers


def _capture_rate(target: Target, capture: Capture, learned: float) -> float:
    """Seconds a token, where this share of the tokens is to be learned."""
    length = min(512, int(target.config.max_position_embeddings))
    rows = max(1, min(PROBE_CAPTURE_TOKENS, capture.batch_tokens) // length)
    places = torch.arange(length)
    examples = [
        Example(id=f"{row}", tokens=places % target.vocab_size, learn=places < learned * length)
        for row in range(rows)
    ]
    start = time.perf_counter()
    compute(target, examples, capture)
    return (time.perf_counter() - start) / (rows * length)
