import shutil
from collections import namedtuple

import pytest

from data_prep.generate import Request
from data_prep.source.self_written import SelfWritten
from data_prep.stage import estimate as module
from data_prep.stage.capture import Capture
from data_prep.stage.estimate import Speed, batch_seconds
from data_prep.stage.tokenize import Tokenize
from tests.data_prep.common import dataset


def test_counts_are_exact_and_nothing_is_written(target, tmp_path):
    job = dataset(tmp_path, capture=Capture(layers=[1], dtype="bfloat16"))
    expected = job.estimate(target)
    assert not (tmp_path / "out").exists()
    assert expected.prompts == 14
    assert expected.answer_tokens == 140
    # Two states of 32 numbers in bf16 and one fp32 logz a token.
    tokens = expected.prompt_tokens + 140
    assert expected.feature_bytes == tokens * (2 * 32 * 2 + 4)
    assert expected.respond_seconds > 0
    assert expected.capture_seconds > 0
    folder = job.prepare(target)
    made = sum(sum(folder.reader(s).lengths) for s in ("train", "val"))
    assert tokens - 140 < made <= tokens
    on_disk = sum(p.stat().st_size for p in folder.path.glob("*/features-*"))
    assert on_disk <= expected.feature_bytes + 2000


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
