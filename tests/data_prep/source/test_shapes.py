import pytest

from data_prep.source.shapes import ShapeError, to_conversation


def roles_and_texts(record):
    return [(m["role"], m["content"]) for m in to_conversation(record, id="x/0").messages]


ASKED = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("Q", ASKED[:1]),
        (["Q", "R"], [("user", "Q"), ("user", "R")]),
        ({"instruction": "Q", "input": "", "output": "A"}, ASKED),
        ({"instruction": "Q", "input": "I", "response": "A"}, [("user", "Q\n\nI"), ASKED[1]]),
        ({"instruction": "Q", "context": "I", "response": "A"}, [("user", "Q\n\nI"), ASKED[1]]),
        ({"instruction": "Q", "text": "A", "decoded": "B"}, ASKED),
        (
            {"instruction": "Q", "instances": [{"input": "I", "output": "A"}]},
            [("user", "Q\n\nI"), ASKED[1]],
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            ASKED,
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]}, ASKED[:1]),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            ASKED,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Q"},
                ]
            },
            [("system", "S"), ASKED[0]],
        ),
        (
            {
                "utterances": [
                    {"speaker": "user", "text": "Q"},
                    {"speaker": "assistant", "text": "A"},
                ]
            },
            ASKED,
        ),
        ({"turns": ["Q", "R"], "reference": ["A"]}, [("user", "Q"), ("user", "R")]),
        ({"prompt": "Q", "completion": "A"}, ASKED),
        ({"prompt": "Q", "generated_text": "A"}, ASKED),
        ({"prompt": "Q", "canonical_solution": "A", "test": "T"}, ASKED),
        ({"question": "Q", "answer": "A"}, ASKED),
        ({"question": "Q", "answer": ["A", "B"]}, ASKED),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, [("system", "S"), *ASKED]),
        ({"problem": "Q", "solution": "A", "level": "5"}, ASKED),
        ({"query": "Q", "index": 1}, ASKED[:1]),
        ({"text": "Q", "code": "A"}, ASKED),
        ({"text": "Q", "question_id": 1}, ASKED[:1]),
        ({"text": "T"}, [("text", "T")]),
        ({"context": "one two", "continuation": "three"}, [("text", "one two three")]),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
            ASKED,
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A\n\nAssistant: more\n\nHuman: R\n\nAssistant:"},
            [ASKED[0], ("assistant", "A\n\nmore"), ("user", "R")],
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ASKED),
        (
            {"Best Generated Conversation": "* * *\nUser 2: Q\nUser 1: A\n[They leave.]"},
            [ASKED[0], ("assistant", "A\n[They leave.]")],
        ),
    ],
)
def test_shapes(record, expected):
    assert roles_and_texts(record) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (3, "is a int"),
        ({"foo": 1, "bar": 2}, "fits no known shape; it has bar, foo"),
        ({"prompt": None}, "fits no known shape"),
        ({"prompt": "  "}, "'prompt' is empty"),
        ({"prompt": 7}, "'prompt' should be text, it is 7"),
        ({"question": "Q", "answer": 7}, "'answer' should be text"),
        ({"messages": []}, "at least one turn"),
        ({"messages": "hello"}, "should be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "should be text"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "begin with a user turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"conversations": [{"value": "x"}]}, "should have role/content"),
        ({"chosen": "no transcript"}, "no speaker is marked"),
        ({"Best Generated Conversation": "Hello!\nUser 2: hi"}, "before the first speaker"),
        ({"instruction": "Q", "instances": []}, "'instances' should be"),
        ({"choices": [{"turns": ["A"]}], "model_id": "m"}, "without the prompts"),
    ],
)
def test_records_that_fit_no_shape_say_why(record, reason):
    with pytest.raises(ShapeError, match=reason.replace("(", r"\(")):
        to_conversation(record, id="x/0")


def test_category_is_kept():
    assert to_conversation({"turns": ["Q"], "category": "math"}, id="x/0").category == "math"
    assert to_conversation({"problem": "Q", "type": "Algebra"}, id="x/0").category == "Algebra"
    assert to_conversation("Q", id="x/0").category is None
