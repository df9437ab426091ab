import pytest

from data_prep.conversation import Conversation, prompt_id, spread, stable_hash
from data_prep.source.shapes import to_conversation


def test_first_and_last_prompt():
    dialogue = to_conversation({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"}, id="x/0")
    assert [m["content"] for m in dialogue.prompt("first")] == ["a"]
    assert [m["content"] for m in dialogue.prompt("last")] == ["a", "b", "c"]
    questions = to_conversation({"turns": ["a", "b"]}, id="x/1")
    assert [m["content"] for m in questions.prompt()] == ["a"]
    with pytest.raises(ValueError, match="without the answers between them"):
        questions.prompt("last")
    with pytest.raises(ValueError, match="no user message"):
        to_conversation({"text": "a"}, id="x/2").prompt()


def test_prompt_id_takes_only_the_index_apart():
    assert prompt_id("c++#1/7#0") == "c++#1/7"
    assert prompt_id("story/12+3") == "story/12"


def test_hash_is_the_same_everywhere():
    assert stable_hash("a") == 0xCA978112CA1BBDCA  # the first 8 bytes of sha256("a")


def test_spread_is_stable_and_keeps_the_order():
    items = [Conversation(f"s/{i}", ({"role": "user", "content": "x"},)) for i in range(100)]
    some = spread(items, 10)
    assert len(some) == 10
    assert some == [i for i in items if i in some]
    assert {c.id for c in some} <= {
        c.id for c in spread(items, 20)
    }  # asking for more keeps what was there
    assert spread(items, None) == items
    half = [int(c.id[2:]) for c in spread(items, 50)]
    assert 10 < sum(i < 50 for i in half) < 40  # from the whole file, not from its head
