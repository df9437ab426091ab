import shutil
from collections import namedtuple

import pytest
from safetensors import safe_open

from data_prep.generate import Request
from data_prep.signal import Sampled, TopK
from data_prep.source.self_written import SelfWritten
from data_prep.stage import estimate as module
from data_prep.stage.capture import Capture
from data_prep.stage.estimate import Speed, batch_seconds
from data_prep.stage.tokenize import Tokenize
from tests.data_prep.common import dataset, respond


def test_counts_are_exact_and_nothing_is_written(target, tmp_path):
    job = dataset(tmp_path, capture=Capture(layers=[1], dtype="bfloat16"))
    expected = job.estimate(target)
    assert not (tmp_path / "out").exists()
    assert expected.prompts == 14
    assert expected.answer_tokens == 140
    # Two states of 32 numbers in bf16 and one fp32 logz a token.
    tokens = expected.prompt_tokens + 140
    assert expected.capture_bytes == tokens * (2 * 32 * 2 + 4)
    assert expected.respond_seconds > 0
    assert expected.capture_seconds > 0
    folder = job.prepare(target)
    made = sum(sum(folder.reader(s).lengths) for s in ("train", "val"))
    assert tokens - 140 < made <= tokens
    on_disk = sum(p.stat().st_size for p in folder.path.glob("*/features-*"))
    assert on_disk <= expected.capture_bytes + 2000


@pytest.mark.parametrize("signal", [TopK(k=16), Sampled(draws=50)])
def test_bytes_of_a_signal_are_those_on_disk(target, tmp_path, signal):
    """Within 3 %, headers and offsets left out: the mean number of ids is measured on examples."""
    answers = dataset(tmp_path, respond=respond(max_new_tokens=40)).prepare(target)
    job = dataset(
        tmp_path,
        respond=respond(max_new_tokens=40),
        capture=Capture(features=False, signal=signal),
    )
    expected = job.estimate(target)
    learned = sum(answers.manifest["splits"][s]["learned"] for s in ("train", "val"))
    assert expected.taught == learned
    cost = {c.name: c for c in expected.teachers}[signal.name]
    assert cost.bytes == pytest.approx(cost.per_position * learned)
    assert expected.capture_bytes == round(cost.bytes)
    folder = job.prepare(target)
    on_disk = 0
    for path in folder.path.glob(f"*/{signal.name}-*"):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys()) - {"positions", "entries"}
            on_disk += sum(file.get_tensor(name).nbytes for name in names)
    assert on_disk == pytest.approx(cost.bytes, rel=0.03)


def test_every_kind_of_teacher_is_compared(target, tmp_path, capsys):
    """Before anything is answered: from the first few tokens of a few answers."""
    expected = dataset(tmp_path).estimate(target)
    names = [c.name for c in expected.teachers]
    assert names == ["online", "features", "topk16", "topk64", "sampled50"]
    costs = {c.name: c.bytes for c in expected.teachers}
    assert costs["online"] == 0
    assert costs["features"] == (expected.prompt_tokens + 140) * (32 * 2 + 4)
    assert costs["topk16"] == 140 * (16 * 4 + 3)
    assert costs["topk64"] == 140 * (64 * 4 + 3)
    assert 140 * (5 + 1) < costs["sampled50"] < 140 * (50 * 5 + 1)
    assert expected.capture_bytes == 0
    expected.say()
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "topk16" in line).split()
    assert line[1:3] == [f"{costs['topk16'] / (expected.prompt_tokens + 140):,.1f}", "67.0"]


def test_prompts_not_written_yet_count(target, tmp_path):
    job = dataset(tmp_path, sources=[SelfWritten(count=5)])
    expected = job.estimate(target)
    assert expected.prompts == 5
    assert expected.answer_tokens == 50


def test_own_answers_take_no_time(target, tmp_path):
    expected = dataset(tmp_path, respond=None, tokenize=Tokenize()).estimate(target)
    assert (expected.prompts, expected.answer_tokens, expected.seconds) == (14, 0, 0.0)


def test_seconds_by_hand():
    speed = Speed(prefill_tokens_per_second=100.0, step_seconds=0.5, rows=2)
    batch = [Request("a", [0] * 50, 10), Request("b", [0] * 20, 4)]
    assert batch_seconds(batch, speed) == pytest.approx(2 * 50 / 100 + 10 * 0.5)
    # Twice the rows that were measured: twice the seconds a step.
    assert batch_seconds(batch * 2, speed) == pytest.approx(4 * 50 / 100 + 10 * 1.0)


def test_a_full_disk_is_refused_before_anything_is_answered(target, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr(module, "measure", lambda *_: Speed(1.0, 1.0, 1))
    with pytest.raises(ValueError, match=r"may need .* GB free; free some room"):
        dataset(tmp_path).prepare(target)
    assert not list((tmp_path / "out").glob("*/respond*"))
