"""The gate's counts, by hand, and what it refuses."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from export.engine.base import Answer, Outcome
from export.engine.load import load_engine, load_environment
from export.served import Along, Served, served


def outcome(*answers: Answer) -> Outcome:
    return Outcome(list(answers), {}, {"x": "1.0"})


def put(
    plain: Outcome, drafted: Outcome, along: list[Along], decoder: Sequence[Answer] = ()
) -> Served:
    return served(
        engine="x",
        ids=["a", "b"],
        plain=plain,
        drafted=drafted,
        along=along,
        decoder=decoder,
        gamma=2,
        max_new_tokens=6,
        dtype="float32",
        timed=True,
    )


TEXT = [7, 1, 2, 3, 4, 5]
NOTHING = Answer([2], 0, [])
NOWHERE = Along([], None)


def test_rounds_are_counted_by_hand() -> None:
    # Two prompts: 5 tokens after the first in 3 rounds (ours: 2), and none.
    plain = outcome(Answer(TEXT, 5, [1] * 5, 3.0), replace(NOTHING, seconds=1.0))
    drafted = outcome(Answer(TEXT, 3, [2, 2, 1], 1.5), replace(NOTHING, seconds=0.5))
    made = put(plain, drafted, [Along([3, 2], None), NOWHERE])
    assert (made.engine_tau, made.reference_tau) == (5 / 3, 5 / 2)
    # [2, 2, 1]: two rounds kept their first draft, none the second; [3, 2]: two, one.
    assert made.engine_accepted_by_depth == [2, 0]
    assert made.reference_accepted_by_depth == [2, 1]
    assert made.difference == pytest.approx(-1 / 3)
    assert made.speedup == pytest.approx(4.0 / 2.0)
    assert (made.own_texts, made.same_texts, made.same_rounds, made.tokens) == (2, 2, 1, 7)
    with pytest.raises(ValueError, match="more than 2% apart"):
        made.insist()


def test_an_engine_that_only_counts_its_steps() -> None:
    plain = outcome(Answer(TEXT, 5, None), NOTHING)
    made = put(
        plain,
        outcome(Answer(TEXT, 2, None), NOTHING),
        [Along([3, 2], None), NOWHERE],
    )
    assert made.engine_tau == 5 / 2
    assert made.engine_accepted_by_depth is None
    assert made.same_rounds == 2
    made.insist()
    assert ("accepted at depth 1", "not shown", "2") in made.table()


def test_another_text_is_told_and_counted_along_the_engines() -> None:
    """Ours writes another last token, which is no fault of the drafter's."""
    theirs = Answer([7, 1, 2, 3, 4, 9], 2, [3, 2])
    made = put(
        outcome(replace(theirs, steps=5, rounds=[1] * 5), NOTHING),
        outcome(theirs, NOTHING),
        [Along([3, 2], 5), NOWHERE],
    )
    assert (made.own_texts, made.same_texts) == (2, 1)
    assert made.apart() == [
        "a: our target would have written another token 6 (kernels round differently); our rounds "
        "are read along the engine's text."
    ]
    assert made.engine_tau == made.reference_tau == 5 / 2
    made.insist()


def test_a_drafter_that_changes_the_text_is_refused_in_full_precision() -> None:
    changed = Answer([7, 1, 2, 3, 4, 9], 2, [3, 2])
    made = put(
        outcome(Answer(TEXT, 5, [1] * 5), NOTHING),
        outcome(changed, NOTHING),
        [Along([3, 2], None), NOWHERE],
    )
    with pytest.raises(ValueError, match=r"another text than alone for 1 of 2 prompts.* a: with"):
        made.insist()
    replace(made, dtype="bfloat16").insist()  # near-ties


def test_our_decoder_must_go_through_the_rounds_of_the_walk() -> None:
    theirs = Answer(TEXT, 2, [3, 2])
    both = (outcome(replace(theirs, steps=5, rounds=[1] * 5), NOTHING), outcome(theirs, NOTHING))
    put(*both, [Along([3, 2], None), NOWHERE], [theirs]).insist()
    other = Answer(TEXT, 2, [2, 3])
    with pytest.raises(ValueError, match=r"rounds \[2, 3\] on prompt 'a', and through \[3, 2\]"):
        put(*both, [Along([3, 2], None), NOWHERE], [other]).insist()
    # An answer of another text says nothing about the walk.
    put(*both, [Along([3, 2], None), NOWHERE], [Answer(TEXT[:-1], 2, [2, 2])]).insist()


def test_rounds_must_make_up_the_answer() -> None:
    with pytest.raises(AssertionError, match="make up the answer"):
        Answer(TEXT, 2, [3, 3])


def test_only_first_tokens_is_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="no round was decoded"):
        put(outcome(NOTHING, NOTHING), outcome(NOTHING, NOTHING), [NOWHERE, NOWHERE])


def test_engines_have_names() -> None:
    assert load_engine("vllm").title == "vLLM"
    with pytest.raises(ValueError, match=r"engine=vlm was asked for.*transformers, vllm"):
        load_engine("vlm")
    with pytest.raises(ValueError, match="install=vlm"):
        load_environment("vlm")
    with pytest.raises(ValueError, match="dtype=float16 was asked for, but vLLM runs here in"):
        load_engine("vllm").refuse_dtype("float16")
