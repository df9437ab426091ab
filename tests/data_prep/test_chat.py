import pytest

from data_prep.chat import (
    generation_prompt,
    prompt_tokens,
    stretches,
    tokens_and_mask,
    user_turn_prefix,
)
from tests.data_prep import templates as t
from tests.tiny import tiny_tokenizer


def say(role, content):
    return {"role": role, "content": content}


ONE = [say("user", "what is two plus two ?"), say("assistant", "it is four")]
TWO = [*ONE, say("user", "and a fox ?"), say("assistant", "the fox ran")]


def assemble(tokenizer, *pieces):
    """Reference: text pieces tokenised one by one, with the mask given by hand."""
    ids, mask = [], []
    for text, learned in pieces:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        mask += [learned] * len(part)
    return ids, mask


def test_chatml_two_turns_by_hand():
    tokenizer = tiny_tokenizer()
    assert tokens_and_mask(tokenizer, TWO) == assemble(
        tokenizer,
        ("<|im_start|>user\nwhat is two plus two ?<|im_end|>\n<|im_start|>assistant\n", False),
        ("it is four<|im_end|>", True),
        ("\n<|im_start|>user\nand a fox ?<|im_end|>\n<|im_start|>assistant\n", False),
        ("the fox ran<|im_end|>", True),
        ("\n", False),
    )


def test_learn_last_leaves_out_earlier_answers():
    tokenizer = tiny_tokenizer()
    ids, mask = tokens_and_mask(tokenizer, TWO, learn="last")
    assert ids == tokens_and_mask(tokenizer, TWO)[0]
    ((start, stop),) = stretches(mask)
    assert tokenizer.decode(ids[start:stop]) == "the fox ran<|im_end|>"


def test_prompt_is_exactly_what_precedes_the_first_learned_token():
    tokenizer = tiny_tokenizer()
    ids, mask = tokens_and_mask(tokenizer, ONE)
    assert prompt_tokens(tokenizer, ONE[:1]) == ids[: mask.index(True)]


def test_an_unanswered_last_question_is_left_out():
    tokenizer = tiny_tokenizer()
    assert tokens_and_mask(tokenizer, TWO[:3]) == tokens_and_mask(tokenizer, ONE)


def test_system_message_and_default_system_prompt():
    tokenizer = t.with_template(t.DEFAULT_SYSTEM)
    opening = "<|im_start|>user\nwhat is two plus two ?<|im_end|>\n<|im_start|>assistant\n"
    for messages, system in ((ONE, "you are a cat"), ([say("system", "be kind"), *ONE], "be kind")):
        assert tokens_and_mask(tokenizer, messages) == assemble(
            tokenizer,
            (f"<|im_start|>system\n{system}<|im_end|>\n{opening}", False),
            ("it is four<|im_end|>", True),
            ("\n", False),
        )


def test_llama_trims_and_writes_bos_once():
    tokenizer = t.with_template(t.LLAMA)
    messages = [ONE[0], say("assistant", "  it is four \n"), *TWO[2:]]
    ids, mask = tokens_and_mask(tokenizer, messages)
    head = "<|head|>user<|tail|>\n\n"
    reply = "<|eot|><|head|>assistant<|tail|>\n\n"
    assert (ids, mask) == assemble(
        tokenizer,
        ("<|im_start|><|head|>system<|tail|>\n\nToday Date: 26 Jul 2024\n\n<|eot|>", False),
        (f"{head}what is two plus two ?{reply}", False),
        ("it is four<|eot|>", True),
        (f"{head}and a fox ?{reply}", False),
        ("the fox ran<|eot|>", True),
    )
    assert sum(i == tokenizer.bos_token_id for i in ids) == 1


def test_qwen_empty_thought_is_not_learned():
    tokenizer = t.with_template(t.QWEN)
    assert tokens_and_mask(tokenizer, ONE) == assemble(
        tokenizer,
        ("<|im_start|>user\nwhat is two plus two ?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\n", False),
        ("it is four<|im_end|>", True),
        ("\n", False),
    )


def test_qwen_real_thought_is_learned_in_the_last_turn():
    tokenizer = t.with_template(t.QWEN)
    messages = [*TWO[:3], say("assistant", "<think>\na dog\n</think>\n\nthe fox ran")]
    ids, mask = tokens_and_mask(tokenizer, messages, learn="last")
    ((start, stop),) = stretches(mask)
    assert tokenizer.decode(ids[start:stop]) == (
        "<think>\na dog\n</think>\n\nthe fox ran<|im_end|>"
    )
    with pytest.raises(ValueError, match=r"message 1 differently .*learn: \"last\""):
        tokens_and_mask(tokenizer, messages, learn="all")


def test_gemma_refuses_system_and_calls_the_assistant_model():
    tokenizer = t.with_template(t.GEMMA)
    ids, mask = tokens_and_mask(tokenizer, TWO)
    learned = [tokenizer.decode(ids[a:b]) for a, b in stretches(mask)]
    assert learned == ["it is four<|eot|>", "the fox ran<|eot|>"]
    with pytest.raises(ValueError, match="System role not supported"):
        tokens_and_mask(tokenizer, [say("system", "be kind"), *ONE])


def test_gpt_oss_channel_is_learned_and_earlier_turns_refused():
    tokenizer = t.with_template(t.GPT_OSS)
    ids, mask = tokens_and_mask(tokenizer, TWO, learn="last")
    ((start, stop),) = stretches(mask)
    assert tokenizer.decode(ids[start:stop]) == "<|channel|>final<|tail|>the fox ran<|return|>"
    with pytest.raises(ValueError, match=r"'return\|>' becomes 'eot\|>"):
        tokens_and_mask(tokenizer, TWO)


def test_generation_marks_equal_the_difference_and_reach_over_the_end_token():
    marked, plain = t.with_template(t.MARKED), tiny_tokenizer()
    for learn in ("all", "last"):
        ours = tokens_and_mask(marked, TWO, learn=learn)
        assert ours == tokens_and_mask(plain, TWO, learn=learn)


def test_marks_around_nothing_are_refused():
    template = t.MARKED.replace("== 'assistant' %}{% gen", "== 'nobody' %}{% gen")
    with pytest.raises(ValueError, match="marks no token"):
        tokens_and_mask(t.with_template(template), ONE)


def test_a_token_across_the_boundary_is_refused():
    # " two" is one token here: the template's last character is a space, the answer's first word.
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'user' %} "
        "{{ m['content'] }}\n{% else %} {{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = t.with_template(template)
    assert len(tokenizer.tokenize(" the")) == 1
    with pytest.raises(ValueError, match="become one token"):
        tokens_and_mask(tokenizer, [ONE[0], say("assistant", "the fox")])


def test_a_base_model_learns_everything():
    tokenizer = t.with_template(None)
    ids, mask = tokens_and_mask(tokenizer, ONE)
    text = tokenizer("what is two plus two ?\n\nit is four")["input_ids"]
    assert ids == [*text, tokenizer.eos_token_id]
    assert all(mask)
    assert prompt_tokens(tokenizer, ONE[:1]) == tokenizer(ONE[0]["content"])["input_ids"]


def test_plain_text_is_learned_throughout_and_has_no_end():
    tokenizer = tiny_tokenizer()
    ids, mask = tokens_and_mask(tokenizer, [say("text", "the dog ran")])
    assert tokenizer.decode(ids) == "the dog ran"
    assert mask == [True] * len(ids)


@pytest.mark.parametrize("messages", [ONE[:1], ONE[1:], [ONE[1], ONE[0]]])
def test_conversations_without_an_answer_are_refused(messages):
    with pytest.raises(ValueError, match="needs an assistant's message"):
        tokens_and_mask(tiny_tokenizer(), messages)


def test_generation_prompt_and_user_prefix():
    tokenizer = t.with_template(t.DEFAULT_SYSTEM)
    assert generation_prompt(tokenizer) == "<|im_start|>assistant\n"
    prefix = tokenizer.decode(user_turn_prefix(tokenizer))
    assert prefix == "<|im_start|>system\nyou are a cat<|im_end|>\n<|im_start|>user\n"
    with pytest.raises(ValueError, match="no chat template"):
        user_turn_prefix(t.with_template(None))


def test_stretches():
    assert stretches([True, True, False, True]) == [(0, 2), (3, 4)]
    assert stretches([False]) == []
