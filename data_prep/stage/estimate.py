"""What a dataset will cost, from a short measured probe, before anything is written."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from conf.console import say
from data_prep.generate import Generator, Request
from data_prep.progress import clock
from data_prep.stage.capture import Capture, compute
from models.target import Target

PROBE_ROWS = 32
PROBE_STEPS = 8
PROBE_CAPTURE_TOKENS = 2048
BYTES_PER_TOKEN = 16
"""Token shards, journal and the prompts' text together, rounded up."""
RESERVE = 64 * 2**20
"""Room that must stay free beside the dataset."""


@dataclass(frozen=True)
class Speed:
    """Measured on this machine just now; `step_seconds` is one token for each of `rows` prompts."""

    prefill_tokens_per_second: float
    step_seconds: float
    rows: int


@dataclass(frozen=True)
class Estimate:
    """`answer_tokens` and all that follows from it are upper bounds: answers may end earlier."""

    prompts: int
    prompt_tokens: int
    answer_tokens: int
    token_bytes: int
    feature_bytes: int
    respond_seconds: float
    capture_seconds: float
    free_bytes: int

    @property
    def bytes(self) -> int:
        return self.token_bytes + self.feature_bytes

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
            f"(features {self.feature_bytes / 1e9:.3g} GB); free {self.free_bytes / 1e9:.1f} GB"
        )
        say(
            f"  time      at most {self.seconds / 3600:.2f} hours: answering "
            f"{clock(self.respond_seconds)}, capturing {clock(self.capture_seconds)} "
            "(measured just now on this machine)"
        )

    def refuse_without_room(self, folder: Path) -> None:
        """Raises ValueError when the disk cannot hold what would be written."""
        if self.bytes + RESERVE > self.free_bytes:
            raise ValueError(
                f"The dataset may need {self.bytes / 1e9:.3g} GB and {RESERVE / 1e9:.3g} GB in "
                f"reserve, but the disk of {folder} has {self.free_bytes / 1e9:.3g} GB free; free "
                "some room, choose another dataset.root, or capture fewer layers (dataset.capture)."
            )


def estimate(
    *,
    target: Target,
    folder: Path,
    answer: tuple[Generator, Sequence[Request]] | None,
    write: Sequence[Request] = (),
    own_tokens: int = 0,
    conversations: int = 0,
    capture: Capture | None,
) -> Estimate:
    """The cost of answering the requests of `answer` (or of `own_tokens` tokens that are there).

    `write` are prompts the target writes itself before.
    """
    requests = list(answer[1]) if answer else []
    prompt_tokens = sum(len(r.tokens) for r in requests) + own_tokens
    answer_tokens = sum(r.max_new_tokens for r in requests)
    seconds = 0.0
    generator = answer[0] if answer else Generator(target=target)
    batches = generator.batches([*requests, *write]) if requests or write else []
    if batches:
        speed = measure(generator, batches[len(batches) // 2])
        seconds = sum(batch_seconds(batch, speed) for batch in batches)
    total = prompt_tokens + answer_tokens
    return Estimate(
        prompts=len(requests) or conversations,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        token_bytes=total * BYTES_PER_TOKEN,
        feature_bytes=total * capture.bytes_per_token(target) if capture else 0,
        respond_seconds=seconds,
        capture_seconds=total * _capture_rate(target, capture) if capture and total else 0.0,
        free_bytes=free_bytes(folder),
    )


def measure(generator: Generator, batch: Sequence[Request]) -> Speed:
    """Answer (a part of) one batch with one new token, and with a few; the first call warms up."""
    rows = list(batch[:PROBE_ROWS])
    steps = min(PROBE_STEPS, max(r.max_new_tokens for r in rows))
    _timed(generator, [replace(r, max_new_tokens=1) for r in rows[:4]])
    first = _timed(generator, [replace(r, max_new_tokens=1) for r in rows])[0]
    whole, made = _timed(generator, [replace(r, max_new_tokens=steps) for r in rows])
    step = (whole - first) / (made - 1) if made > 1 else first
    tokens = len(rows) * max(len(r.tokens) for r in rows)
    return Speed(tokens / first, max(step, 1e-6), len(rows))


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


def _timed(generator: Generator, batch: Sequence[Request]) -> tuple[float, int]:
    start = time.perf_counter()
    answers = generator.answer_batch(batch)
    return time.perf_counter() - start, max(len(a.tokens) for a in answers)


def _capture_rate(target: Target, capture: Capture) -> float:
    """Seconds a token."""
    length = min(512, int(target.config.max_position_embeddings))
    rows = max(1, min(PROBE_CAPTURE_TOKENS, capture.batch_tokens) // length)
    tokens = [torch.arange(length) % target.vocab_size] * rows
    start = time.perf_counter()
    compute(target, tokens, tuple(capture.layers), getattr(torch, capture.dtype))
    return (time.perf_counter() - start) / (rows * length)
