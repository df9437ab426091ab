"""One record of any common shape -> messages. Every shape that is understood is in SHAPES below.

A record is tried against the table from top to bottom; the first row whose fields it has decides.
"""

import re
from collections.abc import Callable
from typing import Any

from data_prep.conversation import Conversation, Message

Record = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
HH_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")
PERSONA_SPEAKER = re.compile(r"(?:^|\n)[*\[( ]*User ([12]):[* ]*")
PERSONA_FIELD = "Best Generated Conversation"


class ShapeError(ValueError):
    """A record that fits no shape, or whose fields do not hold what the shape says."""


def to_conversation(record: Any, *, id: str) -> Conversation:
    """The conversation in one record. Raises ShapeError with the reason."""
    if isinstance(record, str):
        messages = [_user(record, "the string")]
        return Conversation(id, tuple(messages))
    if isinstance(record, list):
        return Conversation(id, tuple(_turns(record, "the list")))
    if not isinstance(record, dict):
        raise ShapeError(f"is a {type(record).__name__}, expected an object, a list or a string")
    filled = {k for k, v in record.items() if v is not None}
    for needed, read in SHAPES:
        if set(needed) <= filled:
            messages = read(record)
            return Conversation(id, tuple(messages), _category(record))
    names = ", ".join(sorted(map(str, record))) or "no fields"
    raise ShapeError(f"fits no known shape; it has {names}, expected e.g. {EXAMPLES}")


# --- readers, one per row of the table -----------------------------------------------------------


def _messages_in(name: str) -> Callable[[Record], list[Message]]:
    return lambda record: _turns(record[name], f"'{name}'")


def _question_in(name: str, *answers: str) -> Callable[[Record], list[Message]]:
    """A prompt in field `name`, and the answer in the first of `answers` that is there."""

    def read(record: Record) -> list[Message]:
        system = record.get("system") or record.get("system_prompt")
        messages = [_message("system", _text(system, "'system'"))] if system else []
        messages.append(_user(record[name], f"'{name}'"))
        return messages + _answer(record, answers)

    return read


def _alpaca(record: Record) -> list[Message]:
    """Instruction, and below it the input. Self-Instruct keeps its input in `instances[0]`."""
    answers = ("output", "response", "answer", "completion")
    if "instances" in record:
        instances = record["instances"]
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise ShapeError("'instances' should be a list of objects with an 'input'")
        record = {**record, **instances[0]}
    question = _user(record["instruction"], "'instruction'")
    extra = record.get("input") or record.get("context")
    if extra:
        question["content"] += "\n\n" + _text(extra, "'input'")
    # A Dolly export names the human answer 'text'; it has neither input nor output.
    dolly = () if {"input", "output", "response"} & set(record) else ("text",)
    return [question, *_answer(record, answers + dolly)]


def _hh(record: Record) -> list[Message]:
    """The preferred dialogue of a pair: a transcript, or a list of messages."""
    chosen = record["chosen"]
    if isinstance(chosen, list):
        return _turns(chosen, "'chosen'")
    text = _text(chosen, "'chosen'")
    if "prompt" in record and not HH_SPEAKER.match(text):
        return [_user(record["prompt"], "'prompt'"), *_answer(record, ("chosen",))]
    return _transcript(text, HH_SPEAKER, {"Human": "user", "Assistant": "assistant"}, "'chosen'")


def _persona(record: Record) -> list[Message]:
    """Two people talk; whoever speaks first is taken as the user."""
    text = _text(record[PERSONA_FIELD], f"'{PERSONA_FIELD}'")
    first = PERSONA_SPEAKER.search(text)
    starter = first.group(1) if first else "1"
    roles = {starter: "user", "2" if starter == "1" else "1": "assistant"}
    return _transcript(text, PERSONA_SPEAKER, roles, f"'{PERSONA_FIELD}'")


def _reference_answers(_: Record) -> list[Message]:
    raise ShapeError("holds answers ('choices') without the prompts they answer")


def _lambada(record: Record) -> list[Message]:
    """A passage and its last words: plain text."""
    context = _text(record["context"], "'context'")
    return [_message("text", f"{context} {_text(record['continuation'], 'continuation')}")]


def _plain_text(record: Record) -> list[Message]:
    return [_message("text", _filled(record["text"], "'text'"))]


SHAPES: list[tuple[tuple[str, ...], Callable[[Record], list[Message]]]] = [
    (("messages",), _messages_in("messages")),
    (("conversations",), _messages_in("conversations")),  # ShareGPT: from, value
    (("conversation",), _messages_in("conversation")),
    (("utterances",), _messages_in("utterances")),  # Taskmaster: speaker, text
    (("chosen",), _hh),  # Anthropic HH transcripts, preference pairs
    (("turns",), _messages_in("turns")),  # MT-bench, Spec-Bench: questions only
    (("choices", "model_id"), _reference_answers),  # MT-bench reference answers
    (("instruction",), _alpaca),  # Alpaca, Dolly, GPTeacher, Self-Instruct
    (("context", "continuation"), _lambada),
    (
        ("prompt",),
        _question_in(
            "prompt", "completion", "response", "generated_text", "canonical_solution", "answer"
        ),
    ),
    (("question",), _question_in("question", "answer", "response", "solution")),
    (("problem",), _question_in("problem", "solution", "answer")),
    (("query",), _question_in("query", "response", "answer")),
    (("text", "code"), _question_in("text", "code")),  # MBPP
    (("text", "question_id"), _question_in("text")),  # Vicuna
    ((PERSONA_FIELD,), _persona),
    (("text",), _plain_text),
]
EXAMPLES = (
    "messages | conversations | turns | instruction (+ input, output) | prompt (+ completion) | "
    "question (+ answer) | problem (+ solution) | chosen | text"
)


# --- pieces --------------------------------------------------------------------------------------


def _turns(turns: Any, where: str) -> list[Message]:
    """A list of {role, content}, {from, value} or {speaker, text}, or of bare user questions."""
    if not isinstance(turns, list) or not turns:
        raise ShapeError(f"{where} should be a list with at least one turn, it is {_short(turns)}")
    if all(isinstance(t, str) for t in turns):
        return [_user(t, where) for t in turns]
    messages = [_turn(turn, f"turn {i} of {where}") for i, turn in enumerate(turns)]
    # A system message between turns is a template's trap; at the front it is the usual one.
    spoken = [m for m in messages if m["role"] != "system"]
    if not spoken or spoken[0]["role"] != "user":
        raise ShapeError(f"{where} does not begin with a user turn")
    return messages


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ShapeError(f"{where} should be an object with role and content, not {_short(turn)}")
    for role_key, text_key in (("role", "content"), ("from", "value"), ("speaker", "text")):
        if role_key in turn and text_key in turn:
            role = ROLES.get(str(turn[role_key]).lower())
            if role is None:
                raise ShapeError(
                    f"{where} has the role {turn[role_key]!r}, expected one of {', '.join(ROLES)}"
                )
            return _message(role, _content(turn[text_key], where))
    raise ShapeError(f"{where} should have role/content or from/value, it has {', '.join(turn)}")


def _content(content: Any, where: str) -> str:
    """Text, or a list of text parts (images and tool calls cannot be read)."""
    if isinstance(content, list):
        odd = [p for p in content if not (isinstance(p, dict) and isinstance(p.get("text"), str))]
        if odd:
            raise ShapeError(f"{where} has a part that is not text: {_short(odd[0])}")
        return "".join(part["text"] for part in content)
    return _text(content, where)


def _transcript(
    text: str, speaker: re.Pattern[str], roles: dict[str, str], where: str
) -> list[Message]:
    """Split at the speakers' marks. Two turns of one speaker in a row are one message."""
    marks = list(speaker.finditer(text))
    if not marks:
        raise ShapeError(f"{where} is no transcript: no speaker is marked in {_short(text)}")
    before = text[: marks[0].start()]
    if any(c.isalnum() for c in before):
        raise ShapeError(f"{where} has text before the first speaker: {_short(before)}")
    messages: list[Message] = []
    ends = [m.start() for m in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        role, content = roles[mark.group(1)], text[mark.end() : end].strip().rstrip("*").rstrip()
        if not content:
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append(_message(role, content))
    if not messages or messages[0]["role"] != "user":
        raise ShapeError(f"{where} does not begin with a turn of the user")
    return messages


def _answer(record: Record, names: tuple[str, ...]) -> list[Message]:
    """The assistant's message, or nothing when the record has no answer."""
    for name in names:
        value = record.get(name)
        if isinstance(value, list):  # several accepted answers: the first
            value = value[0] if value else None
        if value is not None:
            text = _text(value, f"'{name}'")
            return [_message("assistant", text)] if text.strip() else []
    return []


def _user(value: Any, where: str) -> Message:
    return _message("user", _filled(value, where))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _filled(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text.strip():
        raise ShapeError(f"{where} is empty")
    return text


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ShapeError(f"{where} should be text, it is {_short(value)}")
    return value


def _category(record: Record) -> str | None:
    for name in ("category", "domain1", "vertical", "type"):
        value = record.get(name)
        if isinstance(value, str) and value:
            return value
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
