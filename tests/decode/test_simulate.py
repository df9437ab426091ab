"""Rounds read off a trace are those of the decoder, for any rule; and what they cost."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from decode.answers import record
from decode.prompts import Prompt
from decode.session import Round
from decode.simulate import Played, RoundCost, Traced, gain, play, tau, tokens_per_s, wasted
from decode.stop.base import Stop
from decode.stop.confidence import Confidence
from decode.stop.del_exit import DelExit
from decode.stop.dynamic_threshold import DynamicThreshold
from decode.stop.exit import Exit
from decode.stop.heuristic import Heuristic
from decode.stop.specdec_pp import SpecDecPp
from decode.stop.svip import Svip
from decode.trace import Trace, Walked, trace
from decode.tree.chain import Chain
from decode.walk import walk
from models.acceptance import AcceptanceHead
from models.target import Target
from tests.decode.toy import PROMPTS, echo

COST = RoundCost({1: 2.0, 5: 10.0}, {1: 20.0, 5: 24.0}, {1: 1.0, 5: 1.0}, 19.0)


def head() -> AcceptanceHead:
    torch.manual_seed(1)
    return AcceptanceHead(
        state_size=32, embedding_size=32, reads="drawn", rejection_weight=1.0, scale=[0.5, 2.0]
    )


RULES: dict[str, Callable[[AcceptanceHead], Stop | None]] = {
    "none": lambda _: None,
    "confidence": lambda _: Confidence(threshold=0.8),
    "svip": lambda _: Svip(threshold=0.6),
    "heuristic": lambda _: Heuristic(start=2),
    "dynamic_threshold": lambda _: DynamicThreshold(threshold=0.5),
    "specdec_pp": lambda judge: SpecDecPp(threshold=0.6, acceptance=judge),
}


@pytest.fixture(scope="module")
def traced(target: Target, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRAFTSMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        prompts = [Prompt(f"p{i}", tokens, "") for i, tokens in enumerate(PROMPTS)]
        recording = record(target, prompts, bench="toy", max_new_tokens=24)
    drafter = echo(target, noise=0.6)
    drafter.set_acceptance(head())
    made = trace(target, drafter, recording.answers, gamma=5, temperature=0.0, max_new_tokens=24)
    return drafter, recording, made


def require_rounds(found: Played, rounds: list[Round]) -> None:
    assert found.rounds == len(rounds)
    assert found.produced == sum(r.produced for r in rounds)
    assert found.drafted == sum(r.depth for r in rounds)
    assert found.accepted == sum(r.accepted for r in rounds)


@pytest.mark.parametrize("rule", RULES)
def test_rounds_are_those_of_the_decoder(target: Target, traced: tuple, rule: str) -> None:
    """`walk` runs the real policy and drafter round by round (and equals the decoder, see its own
    tests); one rule serves all answers, so what it learns is carried on alike."""
    drafter, recording, made = traced
    policy = Chain(gamma=5, stop=RULES[rule](drafter.acceptance))
    played = play([Traced(made, COST)], RULES[rule](drafter.acceptance), gamma=5)
    lengths = set()
    for answer, found in zip(recording.answers, played, strict=True):
        rounds = walk(target, drafter, policy, answer, max_new_tokens=24)
        require_rounds(found, rounds)
        lengths |= {r.depth for r in rounds}
    assert rule == "none" or lengths - {5}, "no draft ended early"


def test_rounds_from_several_exits_are_those_of_the_decoder(target: Target, traced: tuple) -> None:
    """Each exit has a trace of its own; the rule says which one a round is read from."""
    drafter, recording, _ = traced
    settings: dict = {"gamma": 5, "temperature": 0.0, "max_new_tokens": 24}
    exits = [
        Traced(trace(target, drafter, recording.answers, leave_at=e, **settings), COST)
        for e in (0, 1)
    ]
    assert not np.array_equal(
        exits[0].trace.walked[0].accepted_I, exits[1].trace.walked[0].accepted_I
    )

    def rule() -> DelExit:
        return DelExit(exit_costs=drafter.exit_costs, costs=[0.15, 0.25], probe=3)

    policy = Chain(gamma=5, stop=rule())
    played = play(exits, rule(), gamma=5)
    for answer, found in zip(recording.answers, played, strict=True):
        rounds = walk(target, drafter, policy, answer, max_new_tokens=24)
        require_rounds(found, rounds)
    fixed = play(exits, Exit(exit=0, exit_costs=drafter.exit_costs), gamma=5)
    alone = play(exits[:1], None, gamma=5)
    assert fixed == alone != play(exits, None, gamma=5)


def by_hand() -> Trace:
    """One answer of six tokens: rounds begin at 1..5; two drafts at each, accepted as listed."""
    accepted = np.array([2, 0, 0, 1, 1])
    signals = np.zeros((5, 2, 5))
    signals[:, :, 0] = [[0.9, 0.4], [0.9, 0.9], [0.9, 0.9], [0.4, 0.9], [0.9, 0.9]]
    made = Trace(gamma=2, temperature=0.0, lag=0)
    made.walked.append(
        Walked(
            prompt_id="a",
            length=6,
            starts_I=np.arange(1, 6),
            tested_I=np.array([2, 1, 1, 2, 1]),
            accepted_I=accepted,
            ends_I=np.array([False, False, False, False, True]),
            signals_IKS=signals,
        )
    )
    return made


def test_rounds_and_times_by_hand() -> None:
    cost = RoundCost({1: 2.0, 2: 4.0}, {1: 20.0, 2: 21.0}, {1: 1.0, 2: 1.0}, 19.0)
    # At 1 two are kept and one comes: 4. There one is kept of two: 6, the end.
    (whole,) = play([Traced(by_hand(), cost)], None, gamma=2)
    assert (whole.rounds, whole.produced, whole.drafted, whole.accepted) == (2, 5, 4, 3)
    assert whole.seconds == pytest.approx(2 * 26.0 / 1000)
    # best < 0.5 ends behind the token: at 1 behind the second, at 4 behind the first.
    looks = {"row": 0.25, "best": 0.5, "drawn": 9.0}
    (ended,) = play([Traced(by_hand(), cost, looks)], Confidence(threshold=0.5), gamma=2)
    assert (ended.rounds, ended.produced, ended.drafted, ended.accepted) == (2, 5, 3, 3)
    # Three rows were looked at: log q and its largest, 0.75 ms each.
    assert ended.seconds == pytest.approx((26.0 + 23.0 + 3 * 0.75) / 1000)
    # One draft a round: 1 -> 3, 3 -> 4, 4 -> 6.
    (short,) = play([Traced(by_hand(), cost)], None, gamma=1)
    assert (short.rounds, short.produced) == (3, 5)
    assert tokens_per_s([whole]).value == pytest.approx(5 / 0.052)
    assert tau([whole]).value == 2.5
    assert wasted([whole]).value == pytest.approx(0.25)
    assert gain([whole], [short]).value == pytest.approx(3 * 23.0 / 52.0)


def test_the_end_of_an_answer_adds_no_token() -> None:
    made = by_hand()
    made.walked[0].accepted_I[:] = [0, 0, 0, 0, 1]
    (found,) = play([Traced(made, COST)], None, gamma=2)
    # Four rounds of one token each, then the accepted end without a bonus.
    assert (found.rounds, found.produced) == (5, 5)


def test_another_pair_pays_by_its_ratio() -> None:
    other = COST.with_ratio(0.5)
    assert other.of(3) == pytest.approx(3 * 0.5 * 19.0 + 22.0 + 1.0)
    assert other.ratio == pytest.approx(0.5)
    assert COST.step_ms == pytest.approx(2.0)
    assert COST.ratio == pytest.approx(2.0 / 19.0)
