"""Which positions are learned from: the refused drafts, where the corrected token was predicted."""

import dataclasses

import pytest
import torch

from decode.session import Round
from models.drafter.base import Drafter
from models.target import Features, Target
from tests.train.online.tiny_stream import decoder, learner, medusa, prompts, serve
from train.chunked import chunked_loss, make_lesson
from train.losses import ForwardKL
from train.online.served import Listener, Served, Texts, only, refused_and_accepted
from train.teacher import Teacher


def round_(*, accepted: int, tested: int, produced: int | None = None) -> Round:
    made = accepted + 1 if produced is None else produced
    return Round(4, 3, accepted, tested, made, 0.0, 0.0, 0.0)


def test_a_sequence_worked_by_hand() -> None:
    """Prompt x_0..x_3, answer y_0..y_8 at positions 4..12, three drafts a round.

    Round 1 begins with y_0 known (i=1): y_1, y_2 accepted, the draft of y_3 (position 7) refused:
    p_6 made the corrected token. Round 2 (i=4): y_4, y_5, y_6 accepted, y_7 is a bonus. Round 3
    (i=8): the draft of y_8 (position 12) refused, taught by p_11.
    """
    rounds = [
        round_(accepted=2, tested=3),
        round_(accepted=3, tested=3),
        round_(accepted=0, tested=1),
    ]
    errors, accepted = refused_and_accepted(rounds, prompt=4, length=13)
    assert errors == [(6, 2), (11, 0)]
    assert accepted == [(4, 0), (5, 1), (7, 0), (8, 1), (9, 2)]
    # max_new_tokens=8 cuts y_8 off, and the error with it.
    assert refused_and_accepted(rounds, prompt=4, length=12)[0] == [(6, 2)]
    # The end of the answer accepted inside a draft: nothing was refused.
    ended = [round_(accepted=2, tested=2, produced=2)]
    assert refused_and_accepted(ended, prompt=4, length=7) == ([], [(4, 0), (5, 1)])


@pytest.fixture(scope="module")
def drafter(target: Target) -> Drafter:
    """Right often, wrong often."""
    taught = learner(target, steps=20, prompts=6)
    for job in range(3):
        taught.learn(job, serve(target, taught.shadow, prompts(target, 6, seed=0)), [])
    return taught.shadow


@pytest.fixture(scope="module")
def served(target: Target, drafter: Drafter) -> list[Served]:
    return serve(target, drafter, prompts(target, 6, seed=0) + prompts(target, 6, seed=1))


def draft_at(drafter: Drafter, one: Served, u: int, k: int) -> int:
    """The draft of depth k that p_u teaches, from the training view."""
    texts = Texts.of([one], torch.device("cpu"), torch.float32)
    depth = list(drafter.unroll(texts.features, texts.tokens_BT))[k]
    return int(depth.head(depth.states_BNd[0, u - depth.shift]).argmax())


def test_errors_are_exactly_the_refused_drafts(drafter: Drafter, served: list[Served]) -> None:
    right, wrong, shifted, bonus = [], [], [], 0
    for one in served:
        text = one.tokens_T.tolist()
        for u, k in one.error_E2.tolist():
            wrong.append(draft_at(drafter, one, u, k) == text[u + 1])
            if u + 2 < len(text):
                shifted.append(draft_at(drafter, one, u + 1, k) == text[u + 2])
        for u, k in one.accepted_A2.tolist():
            right.append(draft_at(drafter, one, u, k) == text[u + 1])
        both = {u for u, _ in one.error_E2.tolist()} | {u for u, _ in one.accepted_A2.tolist()}
        assert len(both) == len(one.error_E2) + len(one.accepted_A2)
        bonus += one.answer - 1 - len(both)
    assert len(wrong) > 20
    assert len(right) > 20
    assert bonus > 0, "no round was accepted whole: nothing shows that its bonus is no error"
    assert not any(wrong)
    assert all(right)
    assert any(shifted), "one position later the drafts are not the refused ones"


def test_the_features_are_those_of_a_fresh_forward(target: Target, served: list[Served]) -> None:
    for one in served:
        fresh = target.forward(one.tokens_T[None, :-1]).final_BTd[0]
        torch.testing.assert_close(one.final_Nd, fresh, atol=1e-4, rtol=1e-4)
    prompt = prompts(target, 1, seed=1)[0]
    listener = Listener()
    made = decoder(target, None).generate(prompt.tokens, max_new_tokens=8, on_read=listener)
    short = listener.served(prompt.tokens, made, whole=False)
    # Without the prompt: from its last position on, whose p made y_0.
    assert (short.first, len(short.final_Nd)) == (len(prompt.tokens) - 1, 8)
    fresh = target.forward(short.tokens_T[None, :-1]).final_BTd[0, short.first :]
    torch.testing.assert_close(short.final_Nd, fresh, atol=1e-4, rtol=1e-4)
    padded = Texts.of([short, served[0]], torch.device("cpu"), torch.float32)
    assert padded.features.final_BTd[0, : short.first].abs().max() == 0.0
    assert padded.tokens_BT.shape == (2, max(len(short.tokens_T), len(served[0].tokens_T)))


def test_only_the_chosen_states_get_a_gradient(target: Target, served: list[Served]) -> None:
    """Error at depth k, teacher position u: the state at t = u - (1 + k) of depth k, no other."""
    chosen_M3 = torch.tensor([[0, 8, 0], [0, 10, 2], [1, 9, 1]])
    drafter = medusa(target)
    texts = Texts.of(served[:2], torch.device("cpu"), torch.float32)
    B, T = texts.tokens_BT.shape
    depths = []
    for depth in drafter.unroll(texts.features, texts.tokens_BT):
        leaf_BNd = depth.states_BNd.detach().requires_grad_()
        depths.append(dataclasses.replace(depth, states_BNd=leaf_BNd))
    learn_BT = torch.zeros(B, T, dtype=torch.bool)
    learn_BT[chosen_M3[:, 0], chosen_M3[:, 1] + 1] = True
    lesson = make_lesson(
        tokens_BT=texts.tokens_BT,
        learn_BT=learn_BT,
        final_BTd=texts.features.final_BTd,
        logz_BT=None,
        draft_ids_D=None,
        vocab_size=target.vocab_size,
    )
    teacher = Teacher(target=target)
    teacher.set_vocab(None)
    sums = chunked_loss(
        depths=only(depths, chosen_M3, (B, T)),
        lesson=lesson,
        loss=ForwardKL(),
        projection=teacher,
        depth_decay=1.0,
        chunk_rows=128,
    )
    sums.total.backward()
    touched = [
        (b, t, k)
        for k, depth in enumerate(depths)
        for b, t in (depth.states_BNd.grad.abs().sum(-1) > 0).nonzero().tolist()  # type: ignore[union-attr]
    ]
    assert sorted(touched) == [(0, 7, 0), (0, 7, 2), (1, 7, 1)]
    assert sums.count_K.tolist() == [1, 1, 1]
    # By hand: KL(p_8 || q) of the depth-0 state at index 7.
    logp_V = target.project(texts.features.final_BTd[0, 8]).log_softmax(-1)
    logq_V = depths[0].head(depths[0].states_BNd[0, 7]).log_softmax(-1)
    expected = float((logp_V.exp() * (logp_V - logq_V.detach())).sum())
    assert float(sums.loss_K[0]) == pytest.approx(expected, rel=1e-4)


def test_every_exit_of_a_recurrent_family_learns_everywhere(target: Target) -> None:
    """Shift 0: draft k at teacher position u is the state at index u, whatever k."""
    states_BNd = torch.zeros(1, 12, target.hidden_size)
    base = next(iter(medusa(target).unroll(_zero_features(target), torch.zeros(1, 12).long())))
    exits = [dataclasses.replace(base, states_BNd=states_BNd, shift=0) for _ in range(2)]
    chosen_M3 = torch.tensor([[0, 5, 0], [0, 9, 3]])
    for masked in only(exits, chosen_M3, (1, 12)):
        assert masked.mask_BN is not None
        assert masked.mask_BN.nonzero().tolist() == [[0, 5], [0, 9]]
    # States of chosen positions only: their masks follow the positions.
    anchors = dataclasses.replace(
        base, states_BNd=states_BNd[:, :3], positions_BN=torch.tensor([[2, 5, 9]]), shift=0
    )
    masked = only([anchors], chosen_M3, (1, 12))[0]
    assert masked.mask_BN is not None
    assert masked.mask_BN.tolist() == [[False, True, True]]


def _zero_features(target: Target) -> Features:
    return Features(torch.zeros(1, 12, target.hidden_size))
