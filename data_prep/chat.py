"""Chat template -> token ids, and the exact mask of tokens to learn, made while rendering.

Nothing is found by searching for header strings or by comparing ids with the padding id. For a
template with `{% generation %}` marks the marks decide. For all others the answer of turn i is a
difference of two renderings:

    before_i = render(messages[:i], with the generation prompt)   what the model is given
    after_i  = render(messages[:i+1])                             what is there once it has answered
    learned  = tokens of the whole behind before_i, up to the end of after_i

That is right only if before_i and after_i are prefixes of the whole, as text and as token ids;
this is checked, and a sentence says so where it fails. The end token of an answer (<|im_end|>,
<|eot_id|>, ...) is learned: a drafter has to predict where answers stop. White space behind it is
not: the decoder has stopped by then.
"""

import re
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Literal

from jinja2.exceptions import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from data_prep.conversation import Message

Learn = Literal["all", "last"]
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
USER_TEXT = "the user writes here"


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of the rendered messages, up to where the assistant starts to write.

    Without a chat template (a base model): the plain text of the messages.
    """
    if not tokenizer.chat_template:
        return _encode_text(tokenizer, messages)
    return _encode(tokenizer, render(tokenizer, messages, generation_prompt=True))


def tokens_and_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, learn: Learn = "all"
) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation, and True where an assistant's token is to be learned.

    `learn="last"` counts the last answer only: right for templates that render earlier answers
    differently (they drop thoughts, or close a turn with another token). Messages behind the last
    answer are left out. Plain text, and everything for a base model, is learned throughout.

    Raises ValueError when there is no answer, or when no exact mask can be made.
    """
    if messages[0]["role"] == "text":
        ids = list(tokenizer(messages[0]["content"])["input_ids"])  # type: ignore[arg-type]
        return ids, [True] * len(ids)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise ValueError(
            f"A conversation needs an assistant's message behind a user's to be learned from; this "
            f"one has the roles {', '.join(m['role'] for m in messages)}."
        )
    messages = messages[: answers[-1] + 1]
    if not tokenizer.chat_template:
        ids = _encode_text(tokenizer, messages)
        if isinstance(tokenizer.eos_token_id, int):
            ids.append(tokenizer.eos_token_id)
        return ids, [True] * len(ids)
    turns = answers if learn == "all" else answers[-1:]
    if has_generation_marks(tokenizer):
        ids, mask = _by_marks(tokenizer, messages, turns)
    else:
        ids, mask = _by_difference(tokenizer, messages, turns)
    return ids, _end_with_end_token(tokenizer, ids, mask)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool
) -> str:
    """The template's text. Raises ValueError when the template itself refuses the messages."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        raise ValueError(
            f"The chat template of the target refuses a conversation with the roles "
            f"{', '.join(m['role'] for m in messages)}: {error}. Change the conversation (some "
            "templates know no system message, or want user and assistant in turn) or leave it out."
        ) from error
    return str(text)


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True when the template marks what the assistant writes."""
    return bool(GENERATION_MARK.search(str(tokenizer.chat_template or "")))


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that may end a turn: the special tokens, whatever the template uses of them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {int(i) for i, token in added.items() if token.special}
    ids |= {int(i) for i in tokenizer.all_special_ids}
    return ids


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a template puts in front of an answer; empty when it puts none."""
    if not tokenizer.chat_template:
        return ""
    question = [{"role": "user", "content": USER_TEXT}]
    bare = render(tokenizer, question, generation_prompt=False)
    return render(tokenizer, question, generation_prompt=True).removeprefix(bare)


def user_turn_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the template up to where a user starts to write."""
    text = ""
    if tokenizer.chat_template:
        question = [{"role": "user", "content": USER_TEXT}]
        text = render(tokenizer, question, generation_prompt=False)
    if text.count(USER_TEXT) != 1:
        raise ValueError(
            "This target has no chat template in which a user's turn begins at one place, so it "
            "cannot write user prompts itself; take self_written out of the dataset's sources."
        )
    return _encode(tokenizer, text[: text.index(USER_TEXT)])


def _by_marks(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turns: list[int]
) -> tuple[list[int], list[bool]]:
    """What stands between {% generation %} and {% endgeneration %}, behind the first turn asked."""
    rendered = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [int(i) for i in rendered["input_ids"]]  # type: ignore[call-overload]
    mask = [bool(m) for m in rendered["assistant_masks"]]  # type: ignore[call-overload]
    first = _encode(tokenizer, render(tokenizer, messages[: turns[0]], generation_prompt=True))
    # The shared beginning, not len(first): a marked template may vary its generation prompt.
    start = _common(first, ids)
    mask = [m and i >= start for i, m in enumerate(mask)]
    if not any(mask):
        raise ValueError(
            "The chat template has {% generation %} marks, yet marks no token of the last answer; "
            "repair the template, or remove the marks so that the mask is made by difference."
        )
    return ids, mask


def _by_difference(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turns: list[int]
) -> tuple[list[int], list[bool]]:
    """The prefix difference in the module's docstring, with its checks."""
    whole = render(tokenizer, messages, generation_prompt=False)
    ids = _encode(tokenizer, whole)
    mask = [False] * len(ids)
    for i in turns:
        before = render(tokenizer, messages[:i], generation_prompt=True)
        after = render(tokenizer, messages[: i + 1], generation_prompt=False)
        for name, part in (("before", before), ("after", after)):
            if not whole.startswith(part):
                raise ValueError(
                    f"The chat template renders the conversation {name} the answer in message {i} "
                    f"differently once later messages follow: at character {_common(part, whole)} "
                    f"{_around(part, whole)}. So no exact mask exists for that answer; learn from "
                    'the last answer only (dataset.tokenize.learn: "last"), or let the target '
                    "answer the prompts (dataset.respond)."
                )
        # Qwen3 and others write an empty thought in front of an answer that has none. The model
        # never thinks nothing, so it is no token to learn.
        thought = EMPTY_THOUGHT.match(whole, len(before))
        if thought and thought.end() < len(after):
            before = whole[: thought.end()]
        before_ids = _encode(tokenizer, before)
        start = _common(before_ids, ids)
        if start < len(before_ids):
            raise ValueError(
                f"The first characters of the answer in message {i} and the end of its prompt "
                f"become one token ({tokenizer.decode(ids[start : start + 1])!r}), which a decoder "
                "that is given the prompt never sees; strip the white space around the answer, or "
                "let the target answer the prompts (dataset.respond)."
            )
        after_ids = _encode(tokenizer, after)
        end = _common(after_ids, ids)
        if str(tokenizer.decode(after_ids[end:])).strip():
            raise ValueError(
                f"The end of the answer in message {i} is tokenised differently once later "
                'messages follow; learn from the last answer only (dataset.tokenize.learn: "last").'
            )
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _end_with_end_token(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]
) -> list[bool]:
    """Let every learned stretch end with its end token, not behind it and not before it."""
    ends = end_ids(tokenizer)
    mask = list(mask)
    for start, stop in stretches(mask):
        closing = [j for j in range(start, stop) if ids[j] in ends]
        if closing and not str(tokenizer.decode(ids[closing[-1] + 1 : stop])).strip():
            mask[closing[-1] + 1 : stop] = [False] * (stop - closing[-1] - 1)
        elif not closing and stop < len(ids) and ids[stop] in ends:
            mask[stop] = True  # {% endgeneration %} may stand in front of the end token
    return mask


def stretches(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Half-open ranges of the True runs of a mask."""
    padded = [False, *mask, False]
    edges = [i for i, (a, b) in enumerate(pairwise(padded)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _encode(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Templates write BOS themselves: the tokenizer must not add another."""
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _encode_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    text = "\n\n".join(m["content"] for m in messages)
    return list(tokenizer(text)["input_ids"])  # type: ignore[arg-type]


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the shared beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _around(part: str, whole: str) -> str:
    at = _common(part, whole)
    return f"{part[at : at + 20]!r} becomes {whole[at : at + 20]!r}"
