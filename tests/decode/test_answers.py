"""Recorded answers: made once for the same settings, with the target's own probabilities."""

from pathlib import Path

import pytest
import torch

from decode.answers import Recorded, record
from models.target import Target
from tests.decode.test_replay import PROMPT_SET, cache, ending  # noqa: F401


def test_a_recording_is_made_once_and_knows_its_settings(
    ending: Target,  # noqa: F811
    cache: Path,  # noqa: F811
) -> None:
    first = record(ending, PROMPT_SET[:2], bench="set", max_new_tokens=9, temperature=1.0)
    (file,) = (cache / "answers").iterdir()
    stamp = file.stat().st_mtime_ns
    again = record(ending, PROMPT_SET[:2], bench="set", max_new_tokens=9, temperature=1.0)
    assert again == first
    assert file.stat().st_mtime_ns == stamp
    # One prompt more gives the same answers to the others; another seed does not.
    more = record(ending, PROMPT_SET[:3], bench="set", max_new_tokens=9, temperature=1.0)
    assert [a.tokens for a in more.answers[:2]] == [a.tokens for a in first.answers]
    other = record(ending, PROMPT_SET[:2], bench="set", max_new_tokens=9, temperature=1.0, seed=1)
    assert [a.tokens for a in other.answers] != [a.tokens for a in first.answers]
    assert len(list((cache / "answers").iterdir())) == 3


def test_recorded_probabilities_are_those_of_the_target(
    ending: Target,  # noqa: F811
) -> None:
    answer = record(ending, PROMPT_SET[:1], bench="set", max_new_tokens=6, temperature=0.5).answers[
        0
    ]
    text = torch.tensor([answer.text])
    logp_TV = (ending.project(ending.forward(text).final_BTd[0]) / 0.5).log_softmax(-1)
    for j, token in enumerate(answer.tokens):
        at = len(answer.prompt.tokens) + j - 1
        assert answer.logp[j] == pytest.approx(float(logp_TV[at, token]), abs=1e-4)


def test_recorded_text_is_prompt_then_answer() -> None:
    answer = Recorded(PROMPT_SET[0], [7, 8], [0.0, 0.0])
    assert answer.text == [*PROMPT_SET[0].tokens, 7, 8]
