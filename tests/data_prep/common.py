"""Small datasets out of a file, for the tests of the stages."""

import json
from pathlib import Path
from typing import Any

from data_prep.pipeline import Dataset
from data_prep.source.files import Files
from data_prep.stage.respond import Respond

WORDS = ["cat", "dog", "fox", "mat", "park", "story", "two", "four"]


def write_questions(folder: Path, count: int = 14) -> Path:
    path = folder / "questions.jsonl"
    rows = [
        {
            "question": f"what is the {WORDS[i % 8]} {' and the dog' * (i % 5)} number {i} ?",
            "answer": f"it is {WORDS[(i + 3) % 8]}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def respond(**settings: Any) -> Respond:
    defaults: dict[str, Any] = {"max_new_tokens": 10, "max_batch": 3}
    return Respond(**(defaults | settings))


def dataset(folder: Path, **settings: Any) -> Dataset:
    source = folder / "questions.jsonl"
    if not source.exists():
        write_questions(folder)
    defaults: dict[str, Any] = {
        "name": "small",
        "root": str(folder / "out"),
        "sources": [Files(path=str(source))],
        "holdout": 4,
        "max_prompt_tokens": 200,
        "respond": respond(),
    }
    return Dataset(**(defaults | settings))
