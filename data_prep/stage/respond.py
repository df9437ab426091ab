"""The target answers the prompts: what it says itself is what a drafter has to predict.

Finished batches are appended to `respond.jsonl.partial` and fsynced, so that a run killed at any
moment continues where it was: batches are a function of the requests alone, a half-written last
line is dropped, and a batch that is not complete in the journal is answered again as a whole (same
batch, same seeds, same answers).

Several jobs may share the batches: part i of n answers every n-th batch into a journal of its own,
`respond.jsonl.part-i-of-n`, and can be run again at any time. What the parts have answered is not
answered again when all of it is put together.

A server answers the same requests one by one: its answers are appended as they come, so a kill
loses those in flight. Who gave an answer is written beside it, and is no part of the recipe: greedy
or sampled, it is the target's own either way.
"""

import fcntl
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import TypedDict

from conf.console import say
from data_prep.conversation import prompt_id, stable_hash
from data_prep.generate import Answer, Generator, Request
from data_prep.journal import JOURNAL, Journal, read_journal
from data_prep.progress import Progress
from data_prep.prompts import Prompt
from data_prep.server.base import Server
from data_prep.shards import Example
from models.target import Target


class Sampling(TypedDict):
    """How an answer is drawn. Temperature 0 is greedy."""

    temperature: float
    top_p: float


def _greedy() -> list[Sampling]:
    return [{"temperature": 0.0, "top_p": 1.0}]


@dataclass(kw_only=True)
class Respond:
    """One answer per prompt and entry of `samples`, of at most `max_new_tokens` tokens.

    The seed of a sample is a hash of `seed`, the prompt's id and the entry's number; it is stored
    with the answer. `turn` says which user turn of a longer conversation is answered.
    """

    max_new_tokens: int = 256
    samples: list[Sampling] = field(default_factory=_greedy)
    turn: Literal["first", "last"] = "first"
    seed: int = 0
    batch_tokens: int = 32_768
    max_batch: int = 96

    def __post_init__(self) -> None:
        if not self.samples or self.max_new_tokens < 1:
            raise ValueError(
                f"dataset.respond has {len(self.samples)} samples of {self.max_new_tokens} tokens; "
                "both must be at least 1, e.g. samples: [{temperature: 0, top_p: 1}]."
            )

    def generator(self, target: Target) -> Generator:
        return Generator(target=target, batch_tokens=self.batch_tokens, max_batch=self.max_batch)

    def requests(self, prompts: Sequence[Prompt]) -> list[Request]:
        """One request per prompt and sample; with several samples, ids end in #0, #1, ..."""
        several = len(self.samples) > 1
        return [
            Request(
                id=f"{prompt.id}#{j}" if several else prompt.id,
                tokens=prompt.tokens,
                max_new_tokens=self.max_new_tokens,
                temperature=float(sampling["temperature"]),
                top_p=float(sampling["top_p"]),
                seed=stable_hash(f"respond {self.seed} {prompt.id} {j}") % 2**31,
            )
            for prompt in prompts
            for j, sampling in enumerate(self.samples)
        ]

    def run(
        self,
        target: Target,
        prompts: Sequence[Prompt],
        folder: Path,
        *,
        server: Server | None = None,
    ) -> list[Example]:
        """Answer what `folder`'s journal does not hold yet; examples in the prompts' order.

        With a `server` it is the target there that answers.
        """
        requests = self.requests(prompts)
        answers = self._answers(target, requests, folder, server)
        categories = {p.id: p.category for p in prompts}
        return [
            to_example(request, answers[request.id], categories[prompt_id(request.id)])
            for request in requests
        ]

    def run_part(
        self,
        target: Target,
        prompts: Sequence[Prompt],
        folder: Path,
        *,
        part: int,
        parts: int,
        server: Server | None = None,
    ) -> int:
        """Answer part `part` (0-based) of `parts`; returns how many answers it has."""
        requests = self.requests(prompts)
        batches = self.generator(target).batches(requests)[part::parts]
        path = folder / f"{JOURNAL}.part-{part:05d}-of-{parts:05d}"
        header = self._header(target, requests)
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as lock:
            # The same part twice at a time: the second waits, and finds everything answered.
            fcntl.flock(lock, fcntl.LOCK_EX)
            answers = read_journal(path, header)
            return len(self._answer(target, batches, path, header, answers, server))

    def _header(self, target: Target, requests: Sequence[Request]) -> dict[str, Any]:
        return {"target": target.fingerprint(), **asdict(self), "requests": _digest(requests)}

    def _answers(
        self, target: Target, requests: Sequence[Request], folder: Path, server: Server | None
    ) -> dict[str, Answer]:
        finished = folder / JOURNAL
        partial = folder / f"{JOURNAL}.partial"
        header = self._header(target, requests)
        if finished.exists():
            return read_journal(finished, header)
        answers = read_journal(partial, header) if partial.exists() else {}
        batches = self.generator(target).batches(requests)
        parts = sorted(folder.glob(f"{JOURNAL}.part-*"))
        elsewhere: dict[str, Answer] = {}
        for path in parts:
            elsewhere |= read_journal(path, header)
        answered = {a: elsewhere[a] for a in elsewhere.keys() - answers.keys()}
        if answered:
            with Journal(partial, header) as journal:
                for batch in batches:
                    known = [answered[r.id] for r in batch if r.id in answered]
                    journal.append(known, {r.id: r for r in batch})
            answers |= answered
        answers = self._answer(target, batches, partial, header, answers, server)
        partial.rename(finished)
        for path in parts:
            path.unlink()
        return answers

    def _answer(
        self,
        target: Target,
        batches: Sequence[Sequence[Request]],
        path: Path,
        header: dict[str, Any],
        answers: dict[str, Answer],
        server: Server | None,
    ) -> dict[str, Answer]:
        """Append to the journal `path` what the batches ask and `answers` lacks; returns all."""
        total, done = sum(len(batch) for batch in batches), len(answers)
        if answers:
            say(f"respond: {done} of {total} answers were already there.")
        left = [[r for r in batch if r.id not in answers] for batch in batches]
        asked = {r.id: r for batch in left for r in batch}
        with (
            Journal(path, header) as journal,
            Progress("the target answers", total=total, unit="answers", done=done) as progress,
        ):

            def keep(made: Sequence[Answer]) -> None:
                fresh = [a for a in made if a.id in asked]
                journal.append(fresh, asked)
                answers.update({a.id: a for a in fresh})
                progress.advance(len(fresh), tokens=sum(len(a.tokens) for a in made))

            if server is not None:
                server.answer(
                    target, list(asked.values()), on_start=progress.restart, on_answers=keep
                )
                return answers
            generator = self.generator(target)
            for batch, missing in zip(batches, left, strict=True):
                if missing:
                    keep(generator.answer_batch(batch))
        return answers


def to_example(request: Request, answer: Answer, category: str | None) -> Example:
    """Prompt ids followed by answer ids; exactly the answer's tokens are learned."""
    prompt = len(request.tokens)
    return Example(
        id=request.id,
        tokens=torch.tensor(request.tokens + answer.tokens),
        learn=torch.arange(prompt + len(answer.tokens)) >= prompt,
        category=category,
        finish_reason=answer.finish_reason,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
    )


def _digest(requests: Sequence[Request]) -> str:
    """Tells lists of requests apart: a journal must not be continued with other prompts."""
    return f"{stable_hash(json.dumps([asdict(r) for r in requests])):016x}"
