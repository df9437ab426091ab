"""The replay of served answers against the decoder itself, and the comparison's arithmetic."""

import math

import pytest
import torch

from models.target import Features, Target
from tests.train.online.tiny_stream import GREEDY, TOKENS, decoder, learner, medusa, prompts, serve
from train.online.acceptance import Serving, chain_accepted, chances, compare, replay_rounds
from train.online.served import Served, Texts
from train.online.stream import _counted


def test_rounds_worked_by_hand() -> None:
    """Five answer tokens, chains of 2. a_0 = 1 at y_1, y_3 and a_1 = 1 at y_2."""
    a_KJ = torch.tensor([[0, 1, 0, 1, 0.0], [0, 0, 1, 0, 0.0]])
    # Round 1 (i=1): y_1, y_2 accepted, bonus y_3. Round 2 (i=4): the draft of y_4 is refused.
    found = replay_rounds(a_KJ)
    assert (found.rounds, found.tested, found.accepted) == (2.0, 3.0, 2.0)
    # Chains at i = 1: both drafts (2); i = 2: none; i = 3: y_3 but not y_4 (1); i = 4: none.
    assert chain_accepted(a_KJ) == 3.0
    half = replay_rounds(torch.tensor([[0, 0.5, 0.5]]))
    # i=1 always begins; i=2 only when the draft of y_1 was refused (else y_2 is the bonus).
    assert (half.rounds, half.tested, half.accepted) == (1.5, 1.5, 0.75)


def test_a_replay_of_greedy_answers_is_the_decoding_itself(target: Target) -> None:
    taught = learner(target, steps=30, prompts=6)
    asked = prompts(target, 8, seed=2)
    taught.learn(0, serve(target, taught.serving, asked[:4]), [])
    served = serve(target, taught.shadow, asked)
    accepted = 0.0
    for prompt, one in zip(asked, served, strict=True):
        made = decoder(target, taught.shadow).generate(prompt.tokens, max_new_tokens=TOKENS)
        replayed = replay_rounds(chances(taught.shadow, one, GREEDY))
        assert replayed == _counted(made)
        accepted += replayed.accepted
    assert accepted > 20


def test_the_chance_at_a_temperature(target: Target) -> None:
    """min(1, q(y) / p(y)) of first drafts, from the logits."""
    warm = Serving(gamma=3, temperature=0.9, draft_temperature=0.9, top_p=1.0)
    taught = learner(target, steps=30, prompts=6)
    asked = prompts(target, 6, seed=2)
    served = serve(target, taught.serving, asked, temperature=0.9)
    taught.learn(0, served, [])
    one = served[0]
    a_KJ = chances(taught.shadow, one, warm)
    P = one.prompt
    with torch.no_grad():
        depth = next(iter(taught.shadow.unroll(_features(one), one.tokens_T[None])))
        logits_TD = depth.head(depth.states_BNd[0])
    for j in (1, 5, 9):
        y = int(one.tokens_T[P + j])
        p_V = (target.project(one.final_Nd[P + j - 1]) / 0.9).softmax(-1)
        # The first draft of a round whose root is y_{j-1} (position P+j-1) was made at P+j-2.
        q_V = (logits_TD[P + j - 2] / 0.9).softmax(-1)
        assert float(a_KJ[0, j]) == pytest.approx(min(1.0, float(q_V[y] / p_V[y])), rel=1e-4)
    assert bool((a_KJ >= 0).all() and (a_KJ <= 1).all())


def test_tokens_that_cannot_be_drafted_are_never_accepted(target: Target) -> None:
    small = medusa(target, draft_vocab_size=8)  # ids 0..7
    one = serve(target, small, prompts(target, 1, seed=5))[0]
    a_KJ = chances(small, one, GREEDY)
    outside_J = one.tokens_T[one.prompt :] >= 8
    assert bool(outside_J[1:].any())
    assert float(a_KJ[:, outside_J].sum()) == 0.0


def test_compare_is_paired() -> None:
    found = compare([10.0, 2.0, 6.0], [12.0, 3.0, 7.0], [10, 10, 10])
    assert found.gain == pytest.approx(4 / 30)
    # Residuals 2 - 4/3, 1 - 4/3, 1 - 4/3: sum of squares 6/9; sqrt(3/2 * 6/9) / 30.
    assert found.error == pytest.approx(1 / 30)
    assert (found.serving, found.shadow) == (pytest.approx(0.6), pytest.approx(22 / 30))
    assert math.isnan(compare([1.0], [2.0], [10]).error)


def _features(one: Served) -> Features:
    return Texts.of([one], torch.device("cpu"), torch.float32).features
