"""Answers as they come: an append-only file of JSON lines that survives a kill at any moment."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.generate import Answer, Request

JOURNAL = "respond.jsonl"
OWN = "draftsmith"
"""Named as the engine of answers that our own target gave."""


class Journal:
    """An append-only file of answers, one JSON line each under a header line."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        if self._file.tell() == 0:
            self._write([self.header])
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, answers: Sequence[Answer], requests: dict[str, Request]) -> None:
        """On the disk when this returns."""
        self._write(
            [
                {key: value for key, value in asdict(answer).items() if value is not None}
                | {
                    "temperature": requests[answer.id].temperature,
                    "top_p": requests[answer.id].top_p,
                    "seed": requests[answer.id].seed,
                }
                for answer in answers
            ]
        )

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_journal(path: Path, header: dict[str, Any]) -> dict[str, Answer]:
    """The answers in a journal, after cutting off a last line that was only half written.

    Raises ValueError when the journal belongs to other prompts or settings, or is damaged inside.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    lines = content[:whole].splitlines()
    if not lines:
        return {}
    try:
        parsed = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The journal {path} is damaged ({error}); delete it to let the target answer anew."
        ) from error
    differing = [k for k in header if parsed[0].get(k) != header[k]]
    if differing:
        raise ValueError(
            f"The answers in {path} were made with other settings ({', '.join(differing)} differ); "
            "go back to those settings, give the dataset another name, or delete its folder."
        )
    return {line["id"]: _answer(line) for line in parsed[1:]}


def answered_by(path: Path) -> list[dict[str, Any]]:
    """Who gave the answers of a finished journal: engine, answers, tokens; for the manifest.

    `mean_logprob` is log p of the answers' tokens as the engine gave it, where it was asked for.
    """
    found: dict[str, list[Answer]] = {}
    with path.open("rb") as file:
        next(file)  # the header
        for line in file:
            answer = _answer(json.loads(line))
            found.setdefault(answer.engine or OWN, []).append(answer)
    entries: list[dict[str, Any]] = []
    for engine, answers in sorted(found.items()):
        tokens = sum(len(a.tokens) for a in answers)
        entry = {"engine": engine, "answers": len(answers), "tokens": tokens}
        logprobs = [p for a in answers for p in a.logprobs or ()]
        if logprobs:
            entry["mean_logprob"] = round(sum(logprobs) / len(logprobs), 6)
        entries.append(entry)
    return entries


def _answer(line: dict[str, Any]) -> Answer:
    return Answer(
        line["id"],
        line["tokens"],
        line["finish_reason"],
        engine=line.get("engine"),
        logprobs=line.get("logprobs"),
    )
