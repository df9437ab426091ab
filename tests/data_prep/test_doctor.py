import pytest
import torch

from data_prep.doctor import Doctor
from data_prep.shards import Example
from data_prep.source.shapes import to_conversation
from data_prep.stage.tokenize import Tokenize
from tests.data_prep.templates import LLAMA, QWEN, with_template
from tests.tiny import tiny_target


@pytest.fixture
def doctor(target) -> Doctor:
    return Doctor(target)


@pytest.fixture
def healthy(target) -> Example:
    record = {"question": "what is a cat ?", "answer": "it is a dog"}
    return Tokenize().run(target, [to_conversation(record, id="q/0")])[0]


def with_mask(example: Example, learn, **changes) -> Example:
    return Example(**(vars(example) | {"learn": learn} | changes))


def test_a_healthy_example(doctor, healthy):
    assert doctor.complaint(healthy) is None


def test_the_four_signs(doctor, healthy):
    learn = healthy.learn
    first = int(learn.nonzero()[0])
    cases = {
        "all zero": torch.zeros_like(learn),
        "all one": torch.ones_like(learn),
        "is off": torch.arange(len(learn)) >= first + 1,
        "no end token": learn & (torch.arange(len(learn)) < len(learn) - 1),
    }
    for words, mask in cases.items():
        assert words in (doctor.complaint(with_mask(healthy, mask)) or ""), words
    early = doctor.complaint(with_mask(healthy, torch.arange(len(learn)) >= first - 1))
    assert early is not None
    assert "is off" in early
    assert "'\\n'" in early


def test_a_mask_shifted_by_one_is_found_in_both_directions(doctor, healthy):
    # Two more tokens behind the answer, so that a shift keeps the number of learned tokens.
    tokens = torch.cat([healthy.tokens, healthy.tokens[:2]])
    learn = torch.cat([healthy.learn, torch.zeros(2, dtype=torch.bool)])
    assert doctor.complaint(with_mask(healthy, learn, tokens=tokens)) is None
    for shift in (-1, 1):
        assert doctor.complaint(with_mask(healthy, learn.roll(shift), tokens=tokens)) is not None


def test_cut_answers_and_plain_text_may_have_no_end(doctor, healthy):
    cut = with_mask(healthy, healthy.learn[:-1], tokens=healthy.tokens[:-1], finish_reason="length")
    assert doctor.complaint(cut) is None
    text = with_mask(healthy, torch.ones_like(healthy.learn), finish_reason=None)
    assert doctor.complaint(text) is None


def test_only_the_last_of_several_answers_may_be_cut(target):
    dialogue = to_conversation(
        {"chosen": "\n\nHuman: a cat\n\nAssistant: the dog\n\nHuman: two\n\nAssistant: four"},
        id="d/0",
    )
    (example,) = Tokenize().run(target, [dialogue])
    assert Doctor(target).complaint(example) is None
    end = target.eos_ids[0]
    middle = int((example.learn & (example.tokens == end)).nonzero()[0])
    learn = example.learn.clone()
    learn[middle] = False
    bad = with_mask(example, learn, finish_reason="length")
    assert "no end token" in (Doctor(target).complaint(bad) or "")


@pytest.mark.parametrize("template", [LLAMA, QWEN])
def test_other_templates_are_healthy(template):
    target = tiny_target()
    target.tokenizer = with_template(template)
    record = {"question": "what is a cat ?", "answer": "it is a dog"}
    (example,) = Tokenize().run(target, [to_conversation(record, id="q/0")])
    assert Doctor(target).complaint(example) is None
    shifted = with_mask(example, example.learn.roll(-1))
    assert Doctor(target).complaint(shifted) is not None


def test_examine_names_the_first_and_the_count(doctor, healthy):
    ill = with_mask(healthy, torch.zeros_like(healthy.learn), id="q/7")
    doctor.examine([healthy], "x")
    with pytest.raises(ValueError, match=r"2 of 3 examples of x .* the first, q/7, has nothing"):
        doctor.examine([healthy, ill, ill], "x")


def test_colours_follow_the_mask(doctor, healthy):
    text = doctor.coloured(healthy)
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    assert green == "it is a dog<|im_end|>"
    assert text.plain.startswith("<|im_start|>user\nwhat is a cat ?")
