import pytest

from data_prep.generate import Answer, Generator
from data_prep.source.self_written import SelfWritten
from tests.data_prep.templates import with_template
from tests.tiny import tiny_target


def test_what_is_kept_by_hand(target, monkeypatch):
    ids = target.tokenizer("the cat sat on the mat")["input_ids"]
    other = target.tokenizer("what is two plus two ?")["input_ids"]
    spaced = target.tokenizer(" The cat sat on the mat ")["input_ids"]
    end = target.eos_ids[0]
    bos = target.tokenizer.bos_token_id
    script = [
        (ids, "length"),
        ([*ids, end], "eos"),  # kept
        ([*spaced, end], "eos"),  # the same again
        ([ids[0], end], "eos"),  # too short
        ([*ids, bos, *ids, end], "eos"),  # a special token inside
        ([*other, end], "eos"),  # kept
        ([*target.tokenizer("one fox too many")["input_ids"], end], "eos"),  # not needed
    ]

    def answer_batch(self, batch):
        numbers = [int(r.id.split("/")[1]) for r in batch]
        return [Answer(r.id, *script[min(n, 6)]) for n, r in zip(numbers, batch, strict=True)]

    monkeypatch.setattr(Generator, "answer_batch", answer_batch)
    source = SelfWritten(count=2, min_tokens=3, max_tokens=50)
    found = list(source.read_with(target))
    assert [(c.id, c.messages[0]["content"]) for c in found] == [
        ("self_written/000001", "the cat sat on the mat"),
        ("self_written/000005", "what is two plus two ?"),
    ]
    reasons = [line.split(" ", 1)[1] for line in source.skipped]
    assert reasons[:4] == [
        "did not end within 50 tokens",
        "was written before",
        "has 1 tokens",
        "is no clean text",
    ]


def test_samples_start_at_the_user_turn_with_their_own_seeds(target):
    first, second = SelfWritten(count=2).requests(target, 0, 2)
    assert target.tokenizer.decode(first.tokens) == "<|im_start|>user\n"
    assert (first.temperature, first.top_p, first.max_new_tokens) == (1.0, 0.95, 201)
    assert first.seed != second.seed
    assert SelfWritten(count=9).requests(target, 1, 2) == [second]
    assert SelfWritten(count=2, seed=1).requests(target, 0, 1)[0].seed != first.seed


def test_it_needs_a_target_and_a_template():
    with pytest.raises(ValueError, match="needs the target"):
        list(SelfWritten(count=1).read())
    base = tiny_target()
    base.tokenizer = with_template(None)
    with pytest.raises(ValueError, match="no chat template"):
        list(SelfWritten(count=1).read_with(base))
