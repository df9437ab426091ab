"""Datasets whose answers come from servers over HTTP, with everything that may go wrong."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.folder import DatasetFolder
from data_prep.generate import Generator
from data_prep.journal import JOURNAL
from data_prep.server import pool
from data_prep.server.running import Running
from data_prep.stage.tokenize import Tokenize
from models.target import Target
from tests.data_prep.common import dataset, respond
from tests.data_prep.serving import Serving
from tests.tiny import tiny_target

SAMPLES = [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
PROBES = 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_SECONDS", 0.02)


@pytest.fixture
def whole(target: Target, tmp_path: Path) -> DatasetFolder:
    """What the target answers here."""
    return dataset(tmp_path, name="whole", respond=respond(samples=SAMPLES)).prepare(target)


def server(*serving: Serving, **settings: Any) -> Running:
    defaults: dict[str, Any] = {"probe_prompts": PROBES, "concurrency": 3, "patience_seconds": 0.3}
    return Running(urls=[s.url for s in serving], **(defaults | settings))


def job(tmp_path: Path, given: Running | None, name: str = "served") -> Any:
    return dataset(tmp_path, name=name, respond=respond(samples=SAMPLES), server=given)


def short(tmp_path: Path, given: Running) -> Any:
    """Fewer and shorter answers, where only the error matters."""
    return dataset(tmp_path, name="served", respond=respond(max_new_tokens=4), server=given)


def test_its_answers_are_the_targets_to_the_byte(
    target: Target,
    whole: DatasetFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    with Serving(target).running() as serving:
        folder = job(tmp_path, server(serving, logprobs=True)).prepare(target)
    assert folder.hash == whole.hash
    assert serving.most == 3  # requests in flight
    assert len(serving.asked) == PROBES + 28
    (by,) = folder.manifest["answers"]
    assert by["engine"] == "tinyserve 1.0"
    assert (by["answers"], whole.manifest["answers"][0]["engine"]) == (28, "draftsmith")
    assert by["tokens"] == whole.manifest["answers"][0]["tokens"]
    # the log-probabilities kept are those of the target
    lines = [json.loads(x) for x in (folder.path / JOURNAL).read_text().splitlines()[1:]]
    kept = [p for line in lines for p in line["logprobs"]]
    assert by["mean_logprob"] == pytest.approx(sum(kept) / len(kept), abs=1e-6)
    for split in ("train", "val"):
        reader = folder.reader(split)
        for example in (reader[i] for i in range(3)):
            (line,) = [x for x in lines if x["id"] == example.id]
            logp = target.model(input_ids=example.tokens[None]).logits[0].log_softmax(-1)
            own = logp[:-1].gather(-1, example.tokens[1:, None])[example.learn[1:], 0]
            assert torch.allclose(own, torch.tensor(line["logprobs"]), atol=1e-4)
    said = " ".join(capsys.readouterr().err.split())
    assert "at most 280 tokens on a server" in said
    assert re.search(r"tinyserve 1.0 serves 'tiny'; log-probabilities \S+ from the target's", said)


def test_replicas_share_and_outlive_one_another(
    target: Target, whole: DatasetFolder, tmp_path: Path, capsys: Any
) -> None:
    """One dies with requests in flight, another one answers 500 at first, and a third was never
    there; the first comes back."""
    died, done = threading.Event(), threading.Event()
    first = Serving(target, fault=lambda n: died.set() if n == 6 else None)
    flaky = Serving(target, fault=lambda n: 500 if PROBES <= n < PROBES + 2 else _slow())
    nowhere = Serving(target)
    nowhere.http.server_close()
    back: list[Serving] = []

    def dies_and_comes_back() -> None:
        died.wait()
        first.die()
        with Serving(target, port=first.port).running() as again:
            back.append(again)
            done.wait()

    thread = threading.Thread(target=dies_and_comes_back)
    thread.start()
    with first.running(), flaky.running():
        folder = job(tmp_path, server(nowhere, first, flaky, patience_seconds=9)).prepare(target)
    done.set()
    thread.join()
    assert folder.hash == whole.hash
    said = " ".join(capsys.readouterr().err.split())
    assert f"the server at {nowhere.url} is set aside" in said
    assert f"the server at {first.url} is set aside" in said
    assert f"The server at {first.url} answers again" in said
    assert len(first.asked) > PROBES
    assert len(flaky.asked) > PROBES + 2
    assert len(back[0].asked) > PROBES


def _slow() -> None:
    time.sleep(0.08)


def test_none_left_ends_in_a_sentence_and_the_same_command_continues(
    target: Target, whole: DatasetFolder, tmp_path: Path
) -> None:
    dying = Serving(target, fault=lambda n: "hang up" if n >= 12 else None)
    with dying.running(), pytest.raises(ValueError, match=r"No server has answered for .*kept"):
        job(tmp_path, server(dying)).prepare(target)
    partial = tmp_path / "out/served" / f"{JOURNAL}.partial"
    kept = partial.read_text().splitlines()[1:]
    assert len(kept) == 12 - PROBES  # all that was answered
    partial.write_bytes(partial.read_bytes()[:-9])  # and a kill cuts the last line
    with Serving(target).running() as serving:
        folder = job(tmp_path, server(serving)).prepare(target)
    assert folder.hash == whole.hash
    assert len(serving.asked) == PROBES + 28 - (12 - PROBES - 1)


def test_begun_here_and_continued_there(
    target: Target, whole: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts by a server, by the target here, and the rest by a server again."""
    with Serving(target).running() as serving:
        job(tmp_path, server(serving)).prepare_part(target, part=0, parts=3)
        job(tmp_path, None).prepare_part(target, part=1, parts=3)
        monkeypatch.setattr(Generator, "answer_batch", _refuse_own(target, serving))
        folder = job(tmp_path, server(serving)).prepare(target)
    assert folder.hash == whole.hash
    counts = {e["engine"]: e["answers"] for e in folder.manifest["answers"]}
    assert counts == {"draftsmith": 9, "tinyserve 1.0": 19}


def _refuse_own(target: Target, serving: Serving) -> Any:
    answer = Generator.answer_batch

    def only_the_servers(self: Generator, batch: Any) -> Any:
        assert self is serving.generator
        return answer(self, batch)

    return only_the_servers


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no ids", "returned text without token ids, expected them in 'token_ids'"),
        ("other prompt", "read another prompt than it was sent"),
        ("cut", r"cut the answer to .* off after \d tokens, expected 4"),
        ("stop word", "ended the answer to .* expected it to end with one of"),
        (400, "refused POST /v1/completions with HTTP 400: .*injected 400"),
        (500, "failed 3 times, last at .*HTTP 500"),
        ("abort", r"failed 3 times, last at .*gave up on a request \(abort\)"),
    ],
)
def test_wrong_answers_are_refused(
    target: Target, tmp_path: Path, fault: str | int, message: str
) -> None:
    """After the proof, one prompt again and again; the others are kept."""
    broken = 9
    serving = Serving(target)
    poison: list[list[int]] = []

    def fails(n: int) -> str | int | None:
        prompt = serving.asked[n]["prompt"]
        if n == broken:
            poison.append(prompt)
        return fault if poison and prompt == poison[0] else None

    serving.fault = fails
    with serving.running(), pytest.raises(ValueError, match=message):
        short(tmp_path, server(serving, retries=2, concurrency=1)).prepare(target)
    partial = tmp_path / "out/served" / f"{JOURNAL}.partial"
    assert len(partial.read_text().splitlines()) - 1 >= broken - PROBES


@pytest.mark.parametrize("fault", [None, "no logprobs"])
def test_another_model_is_refused_before_anything_is_written(
    target: Target, tmp_path: Path, fault: str | None
) -> None:
    with (
        Serving(tiny_target(1), fault=lambda _: fault).running() as serving,
        pytest.raises(ValueError, match=r"does not serve the target 'tiny-0': .* at most 0\.1"),
    ):
        short(tmp_path, server(serving)).prepare(target)
    assert len(serving.asked) == PROBES
    partial = tmp_path / "out/served" / f"{JOURNAL}.partial"
    assert len(partial.read_text().splitlines()) == 1


def test_a_replica_that_comes_back_as_another_model_ends_the_run(
    target: Target, tmp_path: Path
) -> None:
    serving = Serving(target)

    def changes(n: int) -> str | None:
        if n == 8:
            serving.generator = Generator(target=tiny_target(1))
            serving.target = serving.generator.target
        return "hang up" if n == 8 else None

    serving.fault = changes
    with serving.running(), pytest.raises(ValueError, match="does not serve the target"):
        short(tmp_path, server(serving, concurrency=1)).prepare(target)


def test_what_is_served_is_asked_first(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Serving(target, names=("a", "b"), room=20, key="secret").running() as serving:
        with pytest.raises(ValueError, match=r"serves 2 models \(a, b\)"):
            short(tmp_path, server(serving)).prepare(target)
        with pytest.raises(ValueError, match=r"server\.model=c was asked for, but .* serves a, b"):
            short(tmp_path, server(serving, model="c")).prepare(target)
        with pytest.raises(ValueError, match="has room for 20 tokens, and the longest prompt"):
            short(tmp_path, server(serving, model="b")).prepare(target)
        serving.room = 500
        with pytest.raises(ValueError, match=r"wants a key \(HTTP 401\)"):
            short(tmp_path, server(serving, model="b")).prepare(target)
        with pytest.raises(ValueError, match="no such environment variable"):
            server(serving, key_from="TINY_KEY")
        monkeypatch.setenv("TINY_KEY", "secret")
        folder = short(tmp_path, server(serving, model="b", key_from="TINY_KEY")).prepare(target)
    assert {body["model"] for body in serving.asked} == {"b"}
    written = b"".join(p.read_bytes() for p in folder.path.rglob("*") if p.is_file())
    assert b"secret" not in written
    with pytest.raises(ValueError, match=r"No server answers: http.*connection"):
        dataset(tmp_path, name="new", server=server(serving)).prepare(target)


def test_bad_arguments(tmp_path: Path) -> None:
    for urls, message in (
        ([], "at least one address"),
        (["http://a:1", "http://a:1/v1/"], "and each once"),
        (["localhost:8000"], "is no address of a server"),
    ):
        with pytest.raises(ValueError, match=message):
            Running(urls=urls)
    assert Running(urls=["http://a:1/", "https://b/x/v1/"]).urls == [
        "http://a:1/v1",
        "https://b/x/v1",
    ]
    with pytest.raises(ValueError, match="concurrency=0"):
        Running(urls=["http://a:1"], concurrency=0)
    with pytest.raises(ValueError, match="nothing for a server to answer"):
        dataset(tmp_path, respond=None, tokenize=Tokenize(), server=Running(urls=["http://a:1"]))
