import pytest
import torch

from data_prep.chat import tokens_and_mask
from data_prep.source.shapes import to_conversation
from data_prep.stage.tokenize import Tokenize
from tests.data_prep.templates import NO_END, with_template
from tests.tiny import tiny_target

ASKED = to_conversation({"question": "what is a cat ?", "answer": "it is a dog"}, id="q/0")


def test_an_example_ends_at_its_end_token(target):
    (example,) = Tokenize().run(target, [ASKED])
    ids, mask = tokens_and_mask(target.tokenizer, ASKED.messages)
    assert example.tokens.tolist() == ids[:-1]  # without the newline behind <|im_end|>
    assert example.learn.tolist() == mask[:-1]
    assert int(example.tokens[-1]) in target.eos_ids
    assert example.finish_reason == "eos"


def test_a_long_answer_is_cut_and_says_so(target):
    (whole,) = Tokenize().run(target, [ASKED])
    (cut,) = Tokenize(max_tokens=len(whole.tokens) - 2).run(target, [ASKED])
    assert torch.equal(cut.tokens, whole.tokens[:-2])
    assert cut.finish_reason == "length"


def test_a_prompt_as_long_as_the_limit_leaves_nothing(target):
    with pytest.raises(ValueError, match=r"Record q/0: its answer begins behind max_tokens=5"):
        Tokenize(max_tokens=5).run(target, [ASKED])
    assert Tokenize(max_tokens=5, on_bad="skip").run(target, [ASKED]) == []


def test_plain_text_is_cut_into_pieces_that_add_up(target):
    text = to_conversation({"text": "the cat sat on the mat and the dog ran"}, id="t/0")
    pieces = Tokenize(max_tokens=4).run(target, [text])
    ids = target.tokenizer(text.messages[0]["content"])["input_ids"]
    assert torch.cat([p.tokens for p in pieces]).tolist() == ids
    assert [p.id for p in pieces[:2]] == ["t/0", "t/0+1"]
    assert all(p.finish_reason is None and bool(p.learn.all()) for p in pieces)


def test_a_template_without_an_end_token_is_refused():
    target = tiny_target()
    target.tokenizer = with_template(NO_END)
    with pytest.raises(ValueError, match="writes no end token"):
        Tokenize().run(target, [ASKED])


def test_a_question_without_an_answer_is_refused(target):
    asked = to_conversation("what ?", id="q/1")
    with pytest.raises(ValueError, match=r"Record q/1: .* needs an assistant's message"):
        Tokenize().run(target, [asked])
