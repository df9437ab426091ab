from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.drafter.base import Depth
from models.head.own import OwnHead
from models.target import Target
from tests.train import toy
from train.chunked import Lesson, make_lesson, rows_of
from train.losses import ForwardKL
from train.metrics import Tally, chain_lengths, drafted_ranks, tally_batch


def lesson_of(learned: list[int], length: int) -> Lesson:
    learn_BT = torch.zeros(1, length, dtype=torch.bool)
    learn_BT[0, learned] = True
    return make_lesson(
        tokens_BT=torch.arange(length)[None],
        learn_BT=learn_BT,
        final_BTd=torch.zeros(1, length, 2),
        logz_BT=None,
        draft_ids_D=None,
        vocab_size=length,
    )


def chain(agrees: list[list[int]], shifts: list[int], max_depth: int | None) -> list[float]:
    """Tokens 3..8 of nine are learned: teacher positions 2..7."""
    lesson = lesson_of([3, 4, 5, 6, 7, 8], 9)
    head = OwnHead(hidden_size=2, vocab_size=9)
    depths = [Depth(torch.zeros(1, 9, 2), head, s) for s in shifts]
    counts = torch.zeros(len(shifts), 6, dtype=torch.bool)
    for k, depth in enumerate(depths):
        counts[k, rows_of(depth, lesson)[1]] = True
    return chain_lengths(
        depths, lesson, torch.tensor(agrees, dtype=torch.bool), counts, max_depth
    ).tolist()


def test_chain_of_two_heads_by_hand() -> None:
    """Column u-2 is teacher position u. A start t has its first draft at u = t+1, its second at
    t+2 one depth on. Starts: t = 1..6. Accepted: t=1: 1 then depth 1 at u=3: 1 -> 2; t=2: 1, u=4: 0
    -> 1; t=3: 0; t=4: 1, u=6: 1 -> 2; t=5: 0 (depth 1 at u=7 cannot help); t=6: 1 and no further
    position -> 1."""
    first = [1, 1, 0, 1, 0, 1]
    second = [0, 1, 0, 0, 1, 1]
    assert chain([first, second], [1, 2], 2) == [6.0, 6.0]


def test_chain_of_a_recurrent_drafter() -> None:
    """One depth serves every draft: runs of agreement 1 1 0 1 1 1 give 2+1+0+3+2+1 drafts."""
    assert chain([[1, 1, 0, 1, 1, 1]], [0], None) == [6.0, 9.0]


def test_the_last_exit_of_a_recurrent_drafter_serves_every_draft() -> None:
    """An earlier exit that is always right (or never) changes nothing."""
    for early in (1, 0):
        assert chain([[early] * 6, [1, 1, 0, 1, 1, 1]], [0, 0], None) == [6.0, 9.0]


def test_a_copy_of_the_target_is_perfect(target: Target) -> None:
    """States f_{t+s} with the target's own head: agreement 1, overlap 1, loss 0, longest chains."""
    torch.manual_seed(0)
    tokens_BT = torch.randint(0, 300, (2, 15))
    learn_BT = torch.ones(2, 15, dtype=torch.bool)
    features = target.forward(tokens_BT)
    drafter = toy.medusa(target, vocab=None)
    lesson = make_lesson(
        tokens_BT=tokens_BT,
        learn_BT=learn_BT,
        final_BTd=features.final_BTd,
        logz_BT=None,
        draft_ids_D=None,
        vocab_size=target.vocab_size,
    )
    head = OwnHead(hidden_size=32, vocab_size=target.vocab_size)
    head.init_from(target, None)
    depths = []
    for shift in (1, 2):
        ahead_BTd = torch.zeros_like(features.final_BTd)
        ahead_BTd[:, :-shift] = features.final_BTd[:, shift:]
        depths.append(Depth(ahead_BTd, head, shift))
    tally = tally_batch(
        depths=depths,
        lesson=lesson,
        loss=ForwardKL(),
        teacher=toy.teacher(target, drafter),
        draft_ids_D=None,
        chunk_rows=5,
        max_depth=2,
    )
    numbers = tally.summary(1.0)
    assert numbers["agreement_0"] == numbers["agreement_1"] == 1.0
    assert numbers["overlap_0"] == pytest.approx(1.0, abs=1e-4)
    assert numbers["loss"] == pytest.approx(0.0, abs=1e-4)
    # Starts t = 0..12 (u = 1..13); all accept two drafts, the last one only one.
    assert numbers["tau"] == pytest.approx(1 + (12 * 2 + 1) / 13)
    # Rank accuracies are the target's own: the label's rank under p_{t+1}, u = t+1 = 1..13.
    p_UV = target.project(features.final_BTd)[:, 1:14].flatten(0, 1)
    best_UR = p_UV.topk(10).indices
    hits = (best_UR == tokens_BT[:, 2:15].flatten()[:, None]).float().mean(0).tolist()
    assert tally.rank_accuracy()[0] == pytest.approx(hits)
    assert tally.count_K.tolist() == [26.0, 24.0]


def test_overlap_of_a_reduced_vocabulary_counts_full_mass(target: Target) -> None:
    """With q = p renormalised over D, sum_v min(p, q) is p's mass inside D."""
    torch.manual_seed(0)
    tokens_BT = torch.randint(0, 300, (1, 12))
    features = target.forward(tokens_BT)
    drafter = toy.medusa(target)
    lesson = make_lesson(
        tokens_BT=tokens_BT,
        learn_BT=torch.ones(1, 12, dtype=torch.bool),
        final_BTd=features.final_BTd,
        logz_BT=None,
        draft_ids_D=drafter.draft_ids_D,
        vocab_size=target.vocab_size,
    )
    head = OwnHead(hidden_size=32, vocab_size=64)
    head.init_from(target, drafter.draft_ids_D)
    tally = tally_batch(
        depths=[Depth(features.final_BTd, head, 0)],
        lesson=lesson,
        loss=ForwardKL(),
        teacher=toy.teacher(target, drafter),
        draft_ids_D=drafter.draft_ids_D,
        chunk_rows=4,
        max_depth=None,
    )
    p_UV = target.project(features.final_BTd)[0, :11].softmax(-1)
    inside_U = p_UV[:, drafter.draft_ids_D].sum(-1)
    assert tally.summary(1.0)["overlap_0"] == pytest.approx(inside_U.mean().item(), rel=1e-4)
    best_U = p_UV.argmax(-1)
    expected = float(torch.isin(best_U, drafter.draft_ids_D).float().mean())  # type: ignore[arg-type]
    assert tally.summary(1.0)["agreement_0"] == pytest.approx(expected)


def test_empty_tally_divides_by_nothing() -> None:
    assert Tally.empty(2, torch.device("cpu")).summary(1.0)["tau"] == 1.0


def test_ranks_of_drafters_without_a_longest_draft() -> None:
    """Measured depths, then the last one for all deeper ones; exits are no depths."""
    tally = Tally.empty(2, torch.device("cpu"))
    tally.count_K += 10
    tally.rank_KR[:, 0] = torch.tensor([8.0, 6.0])
    feeding_back: Any = SimpleNamespace(max_depth=None, reads_features=True)
    found = [row[0] for row in drafted_ranks(tally, feeding_back)]
    assert found == pytest.approx([0.8] + [0.6] * 7)
    exits: Any = SimpleNamespace(max_depth=None, reads_features=False)
    assert [row[0] for row in drafted_ranks(tally, exits)] == pytest.approx([0.6] * 8)
    heads: Any = SimpleNamespace(max_depth=2, reads_features=True)
    assert [row[0] for row in drafted_ranks(tally, heads)] == pytest.approx([0.8, 0.6])


def test_the_loss_is_that_of_the_trained_depths() -> None:
    tally = Tally.empty(3, torch.device("cpu"))
    tally.count_K += 10
    tally.loss_K += torch.tensor([10.0, 20.0, 40.0])
    assert tally.summary(0.5)["loss"] == pytest.approx(1 + 1 + 1)
    assert tally.summary(0.5, trained=2)["loss"] == pytest.approx(1 + 1)
