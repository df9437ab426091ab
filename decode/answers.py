"""Answers of the target, recorded once so that many drafters can be replayed against them.

A recording is the target's own answer to every prompt, with log p(y) of each token at the serving
temperature. It runs LONGEST tokens past `max_new_tokens`, because the last round of a decoder does
so too. It is kept in the user's cache under a name made of everything it depends on: weights, chat
template, prompts, temperature, length, seed, samples, dtype.

Shape legend: B sequences, T positions, N rows, d hidden size, V vocabulary.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.console import say
from data_prep.conversation import stable_hash
from data_prep.generate import Answer, Generator, Request
from data_prep.prompts import Prompt
from models.packaged import cache_dir
from models.target import Target

LONGEST = 8
"""Drafts of a chain that a recording has room for."""
BATCH_TOKENS = 16_384
LIVE_LOGITS = 2**24


@dataclass(frozen=True)
class Recorded:
    """One answer: its tokens (the end-of-answer token included) and log p of each.

    log p is 0 at temperature 0, where the target has no choice.
    """

    prompt: Prompt
    tokens: list[int]
    logp: list[float]

    @property
    def text(self) -> list[int]:
        """Prompt and answer: answer token j stands at position len(prompt) + j."""
        return [*self.prompt.tokens, *self.tokens]


@dataclass(frozen=True)
class Recording:
    """All answers to a benchmark, `samples` of each prompt in a row, and how they were made."""

    bench: str
    temperature: float
    max_new_tokens: int
    seed: int
    samples: int
    answers: list[Recorded]


def record(
    target: Target,
    prompts: Sequence[Prompt],
    *,
    bench: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    samples: int = 1,
) -> Recording:
    """The recording of these prompts, from the cache or made now.

    Each answer is drawn with a seed of its own, so that a prompt gets the same ones whatever stands
    beside it.
    """
    _check(target, prompts, max_new_tokens, temperature, samples)
    settings = _settings(target, prompts, max_new_tokens, temperature, seed, samples)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_dir() / "answers" / f"{bench}-T{temperature:g}-{key}.safetensors"
    if not file.is_file():
        begin = time.perf_counter()
        count = f"{len(prompts) * samples} answers of up to {max_new_tokens} tokens"
        say(f"The target writes {count} (bench={bench}, temperature={temperature:g}) once.")
        made = _write_answers(target, prompts, max_new_tokens, temperature, seed, samples)
        _save(file, made, _log_p(target, prompts, made, temperature), settings)
        say(f"Kept in {file} ({time.perf_counter() - begin:.0f} s).")
    answers = _load(file, [p for p in prompts for _ in range(samples)])
    return Recording(bench, temperature, max_new_tokens, seed, samples, answers)


def padded_batches(texts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Texts of similar length together, padded on the right: `(which, tokens_BT)`.

    Causal layers need no mask then: a padding token stands behind everything that is read.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    while order:
        longest = len(texts[order[0]])
        count = max(1, BATCH_TOKENS // longest)
        batch, order = order[:count], order[count:]
        tokens_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            tokens_BT[row, : len(texts[i])] = torch.tensor(texts[i])
        yield batch, tokens_BT


def chunks(rows_Nd: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows in pieces whose logits fit in memory."""
    size = max(64, LIVE_LOGITS // vocab_size)
    for start in range(0, len(rows_Nd), size):
        piece = slice(start, start + size)
        yield piece, rows_Nd[piece]


def _write_answers(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    samples: int,
) -> list[list[int]]:
    """`samples` answers of each prompt, in order."""
    requests = [
        Request(
            id=f"{prompt.id}#{sample}",
            tokens=prompt.tokens,
            max_new_tokens=max_new_tokens + LONGEST,
            temperature=temperature,
            seed=stable_hash(f"{seed}/{prompt.id}#{sample}") % 2**63,
        )
        for prompt in prompts
        for sample in range(samples)
    ]
    found: dict[str, list[int]] = {}

    def keep(batch: list[Answer]) -> None:
        found.update({answer.id: answer.tokens for answer in batch})
        say(f"  {len(found)} of {len(requests)} answers")

    Generator(target=target).answer(requests, on_batch=keep)
    return [found[request.id] for request in requests]


@torch.inference_mode()
def _log_p(
    target: Target, prompts: Sequence[Prompt], made: list[list[int]], temperature: float
) -> list[list[float]]:
    """log p(y) of every answer token, softmax(logits / temperature) in fp32."""
    if temperature == 0.0:
        return [[0.0] * len(answer) for answer in made]
    samples = len(made) // len(prompts)
    starts = [len(prompts[i // samples].tokens) for i in range(len(made))]
    texts = [[*prompts[i // samples].tokens, *answer] for i, answer in enumerate(made)]
    found: list[list[float]] = [[] for _ in made]
    for batch, tokens_BT in padded_batches(texts):
        final_BTd = target.forward(tokens_BT.to(target.device)).final_BTd
        for row, i in enumerate(batch):
            label_N = torch.tensor(made[i], device=target.device)
            # f_t predicts x_{t+1}: answer token 0 is predicted at the prompt's last position.
            rows_Nd = final_BTd[row, starts[i] - 1 : starts[i] - 1 + len(made[i])]
            for piece, rows_nd in chunks(rows_Nd, target.vocab_size):
                logp_nV = (target.project(rows_nd).float() / temperature).log_softmax(-1)
                found[i] += logp_nV.gather(-1, label_N[piece, None])[:, 0].tolist()
    return found


def _settings(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    samples: int,
) -> dict[str, Any]:
    """Everything the answers depend on. Greedy answers do not depend on a seed."""
    asked = json.dumps([[p.id, p.tokens] for p in prompts])
    return {
        "target": target.fingerprint(),
        "template": target.template_hash(),
        "ends": target.eos_ids,
        "prompts": hashlib.sha256(asked.encode()).hexdigest(),
        "tokens": max_new_tokens + LONGEST,
        "temperature": temperature,
        "seed": seed if temperature > 0.0 else None,
        "samples": samples,
        "dtype": str(target.dtype),
        "device": target.device.type,
    }


def _save(
    file: Path, made: list[list[int]], logp: list[list[float]], settings: dict[str, Any]
) -> None:
    """One file, written beside its place and then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    os.close(handle)
    try:
        tensors = {
            "lengths": torch.tensor([len(answer) for answer in made]),
            "tokens": torch.tensor([t for answer in made for t in answer], dtype=torch.int32),
            "logp": torch.tensor([x for answer in logp for x in answer], dtype=torch.float32),
        }
        save_file(tensors, temporary, metadata={"settings": json.dumps(settings)})
        Path(temporary).replace(file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _load(file: Path, prompts: Sequence[Prompt]) -> list[Recorded]:
    tensors = load_file(file)
    lengths = tensors["lengths"].tolist()
    tokens = tensors["tokens"].split(lengths)
    logp = tensors["logp"].split(lengths)
    return [
        Recorded(prompt, t.tolist(), x.tolist())
        for prompt, t, x in zip(prompts, tokens, logp, strict=True)
    ]


def _check(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    samples: int,
) -> None:
    if not prompts:
        raise ValueError(
            "There is no prompt to record answers to, expected at least one, because the benchmark "
            "holds none or all are longer than max_prompt_tokens; raise that or choose another "
            "bench."
        )
    if samples < 1 or (samples > 1 and temperature == 0.0):
        raise ValueError(
            f"samples={samples} answers a prompt were asked for at temperature {temperature:g}; "
            "expected 1 or more, and exactly 1 at temperature 0, where all answers are the same."
        )
    limit = target.config.max_position_embeddings
    longest = max(len(p.tokens) for p in prompts)
    if longest + max_new_tokens + LONGEST > limit:
        raise ValueError(
            f"A prompt of {longest} tokens, max_new_tokens={max_new_tokens} and the {LONGEST} "
            f"tokens a last round may add go beyond the {limit} positions '{target.name}' was "
            "trained for; lower max_prompt_tokens or max_new_tokens."
        )
