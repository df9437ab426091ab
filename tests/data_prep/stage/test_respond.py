import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep.generate import Generator
from data_prep.prompts import Prompt, read_prompts
from data_prep.source.files import Files
from data_prep.stage.respond import JOURNAL, Respond, read_journal
from tests.data_prep.common import respond, write_questions

ROOT = Path(__file__).parents[3]


@pytest.fixture
def prompts(target, tmp_path) -> list[Prompt]:
    return read_prompts([Files(path=str(write_questions(tmp_path)))], target.tokenizer)


def same(a, b):
    return all(
        x.id == y.id and torch.equal(x.tokens, y.tokens) and torch.equal(x.learn, y.learn)
        for x, y in zip(a, b, strict=True)
    )


def test_greedy_answers_are_the_targets_own(target, prompts, tmp_path):
    examples = respond().run(target, prompts, tmp_path)
    assert [e.id for e in examples] == [p.id for p in prompts]
    for example, prompt in zip(examples, prompts, strict=True):
        at = len(prompt.tokens)
        assert example.tokens[:at].tolist() == prompt.tokens
        assert not example.learn[:at].any()
        assert example.learn[at:].all()
        # Reference: the whole sequence at once; its argmax at t is the token at t+1.
        logits = target.model(input_ids=example.tokens[None]).logits[0]
        assert torch.equal(logits.argmax(-1)[at - 1 : -1], example.tokens[at:])
        ended = int(example.tokens[-1]) in target.eos_ids
        assert example.finish_reason == ("eos" if ended else "length")
        assert len(example.tokens) - at == 10 or ended


def test_several_samples_have_their_own_ids_and_seeds(target, prompts, tmp_path):
    samples = [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
    examples = respond(samples=samples).run(target, prompts[:3], tmp_path)
    assert [e.id for e in examples[:2]] == ["questions/0#0", "questions/0#1"]
    assert [e.temperature for e in examples[:2]] == [0.0, 1.0]
    assert len({e.seed for e in examples}) == 6
    lines = [json.loads(x) for x in (tmp_path / JOURNAL).read_text().splitlines()[1:]]
    assert {x["id"]: x["seed"] for x in lines} == {e.id: e.seed for e in examples}
    # A seed alone decides a sample: the same request answered alone gives the same tokens.
    stage = respond(samples=samples)
    request = stage.requests(prompts[:3])[1]
    (alone,) = Generator(target=target).answer_batch([request])
    assert alone.tokens == examples[1].tokens[len(request.tokens) :].tolist()


def test_a_journal_cut_anywhere_is_continued(target, prompts, tmp_path, monkeypatch):
    stage = respond(samples=[{"temperature": 1.0, "top_p": 0.95}])
    whole = stage.run(target, prompts, tmp_path / "whole")
    journal = (tmp_path / "whole" / JOURNAL).read_bytes()
    rng = random.Random(0)
    answered: list[str] = []
    answer_batch = Generator.answer_batch

    def counted(self, batch):
        answered.extend(r.id for r in batch)
        return answer_batch(self, batch)

    monkeypatch.setattr(Generator, "answer_batch", counted)
    for number, cut in enumerate([0, 5, *rng.sample(range(len(journal)), 8), len(journal)]):
        folder = tmp_path / f"cut{number}"
        folder.mkdir()
        (folder / f"{JOURNAL}.partial").write_bytes(journal[:cut])
        answered.clear()
        assert same(stage.run(target, prompts, folder), whole)
        assert (folder / JOURNAL).read_bytes() == journal
        assert not (folder / f"{JOURNAL}.partial").exists()
        lines = journal[:cut].count(b"\n") - 1  # finished answers that survived the cut
        assert len(answered) <= len(prompts) - max(0, lines // 3 * 3)


def test_a_finished_journal_asks_nothing(target, prompts, tmp_path, monkeypatch):
    whole = respond().run(target, prompts, tmp_path)
    monkeypatch.setattr(Generator, "answer_batch", None)
    assert same(respond().run(target, prompts, tmp_path), whole)


def test_another_setting_or_prompt_is_refused(target, prompts, tmp_path):
    respond().run(target, prompts, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(max_new_tokens, requests differ\)"):
        respond(max_new_tokens=11).run(target, prompts, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(requests differ\)"):
        respond().run(target, prompts[1:], tmp_path)


def test_a_journal_damaged_inside_is_refused(tmp_path):
    path = tmp_path / JOURNAL
    path.write_bytes(b'{"a": 1}\n{bro\n{"id": "x", "tokens": [], "finish_reason": "eos"}\n')
    with pytest.raises(ValueError, match="is damaged"):
        read_journal(path, {"a": 1})


def test_nothing_to_sample_is_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        Respond(samples=[])


CHILD = """
import sys, time
from pathlib import Path
from data_prep.generate import Generator
from data_prep.prompts import read_prompts
from data_prep.source.files import Files
from tests.data_prep.common import respond
from tests.tiny import tiny_target

questions, folder = sys.argv[1:]
answer_batch = Generator.answer_batch
def slowly(self, batch):
    time.sleep(0.15)
    return answer_batch(self, batch)
Generator.answer_batch = slowly
target = tiny_target()
prompts = read_prompts([Files(path=questions)], target.tokenizer)
print("ready", flush=True)
respond(samples=[{"temperature": 1.0, "top_p": 0.95}]).run(target, prompts, Path(folder))
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(target, tmp_path):
    questions = write_questions(tmp_path, 40)
    prompts = read_prompts([Files(path=str(questions))], target.tokenizer)
    stage = respond(samples=[{"temperature": 1.0, "top_p": 0.95}])
    whole = stage.run(target, prompts, tmp_path / "whole")
    folder = tmp_path / "killed"
    rng = random.Random(time.time_ns())
    sizes = [0]
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(questions), str(folder)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.2, 0.6))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        sizes.append((folder / f"{JOURNAL}.partial").stat().st_size)
    assert sizes == sorted(sizes)  # nothing finished was lost
    assert sizes[-1] > 300
    assert same(stage.run(target, prompts, folder), whole)
    assert (folder / JOURNAL).read_bytes() == (tmp_path / "whole" / JOURNAL).read_bytes()
