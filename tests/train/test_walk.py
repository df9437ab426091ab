"""The chunked walk against plain autograd: every loss, every kind of head, both precisions.

Shape legend: B sequences, T positions, U teacher positions, K named ids, d hidden size.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import train.gradients
import train.walk
from models.drafter.base import Depth
from models.head import Head
from models.head.frozen import FrozenHead
from models.head.low_rank import LowRankHead
from models.head.own import OwnHead
from models.target import Target
from tests.train import toy
from tests.train.test_divergences import LOSSES
from train.chunked import LossSums, chunked_loss, plain_loss
from train.lesson import Lesson, make_lesson
from train.losses import (
    CrossEntropy,
    ForwardKL,
    LKLambda,
    RowLoss,
    SmoothL1,
    TargetRows,
    Tempered,
    Term,
    TVDPlusPlus,
    WeightedSum,
)

EVERY = [
    *LOSSES,
    CrossEntropy(),
    TVDPlusPlus(mode="sampled", samples=3),
    Tempered(loss=ForwardKL(), temperature=2.0),
    WeightedSum(
        terms={
            "lk": Term(weight=1.0, loss=LKLambda(alpha="batch")),
            "tvd": Term(weight=0.5, loss=TVDPlusPlus(mode="sampled", samples=2)),
            "ce": Term(weight=0.1, loss=CrossEntropy()),
        }
    ),
]
NAMES = [f"{i}-{type(loss).__name__}" for i, loss in enumerate(EVERY)]
SHIFTS = (1, 2)


class CurvedHead(Head):
    """Not a plain matrix: differentiated by autograd."""

    def __init__(self, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self.down = nn.Linear(hidden_size, 8)
        self.up = nn.Linear(8, vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(states)))


class Case:
    """Two depths over the tiny target, with states that are leaves."""

    def __init__(self, target: Target, *, head: str, vocab: int | None = 64) -> None:
        drafter = toy.medusa(target, vocab=vocab)
        self.teacher = toy.teacher(target, drafter)
        torch.manual_seed(5)
        tokens_BT = torch.randint(0, 300, (3, 21))
        features = target.forward(tokens_BT)
        self.lesson = make_lesson(
            tokens_BT=tokens_BT,
            learn_BT=torch.rand(3, 21) < 0.6,
            final_BTd=features.final_BTd,
            logz_BT=None,
            draft_ids_D=drafter.draft_ids_D,
            vocab_size=drafter.vocab_size,
        )
        sizes: dict[str, Any] = {"hidden_size": 32, "vocab_size": vocab or target.vocab_size}
        self.heads: list[Head] = []
        if head == "frozen":
            self.heads = [FrozenHead(**sizes)] * 2
            self.heads[0].bind(target, drafter.draft_ids_D)
        elif head == "shared":
            self.heads = [OwnHead(**sizes, bias=True)] * 2
        elif head == "low_rank":
            self.heads = [LowRankHead(**sizes, rank=8) for _ in SHIFTS]
        elif head == "curved":
            self.heads = [CurvedHead(**sizes) for _ in SHIFTS]
        else:
            self.heads += [OwnHead(**sizes) for _ in SHIFTS]
            for own in self.heads:
                own.init_from(target, drafter.draft_ids_D)
        noise = 0.3 * torch.randn(2, *features.final_BTd.shape)
        self.states = [(features.final_BTd + n).requires_grad_() for n in noise]

    def depths(self, **more: Any) -> list[Depth]:
        return [
            Depth(s, h, shift, **more)
            for s, h, shift in zip(self.states, self.heads, SHIFTS, strict=True)
        ]

    def gradients(self, sums: LossSums, *others: Tensor) -> list[Tensor]:
        parameters = {id(p): p for head in self.heads for p in head.parameters()}
        tensors = [*self.states, *parameters.values(), *others]
        return list(torch.autograd.grad(0.25 * sums.total, tensors))

    def compare(
        self, loss: RowLoss, *, bf16: bool = False, chunk_rows: int = 7, **more: Any
    ) -> float:
        """The largest relative distance of a gradient (Frobenius); losses and counts must agree."""
        found = []
        others = [t for t in more.values() if t.requires_grad]
        for way in ("chunked", "plain"):
            common: dict[str, Any] = {
                "depths": self.depths(**more),
                "lesson": self.lesson,
                "loss": loss,
                "projection": self.teacher,
                "depth_decay": 0.8,
            }
            torch.manual_seed(3)  # the draws
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                if way == "chunked":
                    sums = chunked_loss(chunk_rows=chunk_rows, **common)
                else:
                    sums = plain_loss(**common)
            found.append((sums, self.gradients(sums, *others)))
        (chunked, ours), (plain, theirs) = found
        rel = 1e-2 if bf16 else 1e-5
        torch.testing.assert_close(chunked.loss_K, plain.loss_K, rtol=rel, atol=rel)
        assert chunked.right_K.tolist() == plain.right_K.tolist()
        assert chunked.count_K.tolist() == plain.count_K.tolist()
        far = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
        assert min(float(b.norm()) for b in theirs) > 0, "a gradient of 0 compares nothing"
        return max(far)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, products in tiles of four: all edges are walked over."""
    monkeypatch.setattr(train.walk, "BLOCK_LOGITS", {"cpu": 200})
    monkeypatch.setattr(train.gradients, "TILE", 128)


@pytest.mark.parametrize("vocab", [64, None], ids=["reduced", "whole"])
@pytest.mark.parametrize("head", ["own", "frozen"])
@pytest.mark.parametrize("loss", EVERY, ids=NAMES)
def test_every_loss_in_fp32(target: Target, loss: RowLoss, head: str, vocab: int | None) -> None:
    assert Case(target, head=head, vocab=vocab).compare(loss) < 1e-5


@pytest.mark.parametrize("head", ["own", "frozen"])
@pytest.mark.parametrize("loss", EVERY, ids=NAMES)
def test_every_loss_under_bf16_autocast(target: Target, loss: RowLoss, head: str) -> None:
    assert Case(target, head=head).compare(loss, bf16=True) < 1e-2


@pytest.mark.parametrize("head", ["own", "shared", "frozen", "low_rank", "curved"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_every_kind_of_head(target: Target, head: str, bf16: bool, chunk_rows: int) -> None:
    """With a loss that needs a pass before: what autocast keeps of it must not cut gradients."""
    loss = LKLambda(alpha="batch")
    far = Case(target, head=head).compare(loss, bf16=bf16, chunk_rows=chunk_rows)
    assert far < (1e-2 if bf16 else 1e-5)


def test_bf16_parameters_add_up_in_bf16_within_one_per_cent(target: Target) -> None:
    """Sixteen chunks into a bf16 gradient, against one product: rounding stays small."""
    case = Case(target, head="own")
    for head in case.heads:
        head.to(torch.bfloat16)
    case.states = [s.detach().bfloat16().requires_grad_() for s in case.states]
    assert case.compare(ForwardKL(), chunk_rows=3) < 1e-2


@pytest.mark.parametrize("loss", [ForwardKL(), LKLambda(alpha="batch")])
def test_sampled_positions_taught_more_than_once(target: Target, loss: RowLoss) -> None:
    """Four states at the same position are four rows of one teacher position."""
    case = Case(target, head="own")
    positions = torch.tensor([3, 3, 9, 3, 12, 3, 9, 7, 6, 5, 4, 1, 0, 2, 8, 11, 15, 16, 17, 3, 10])
    assert case.compare(loss, positions_BN=positions.expand(3, -1)) < 1e-5


def test_depths_may_share_their_states(target: Target) -> None:
    case = Case(target, head="own")
    case.states = [case.states[0]] * 2
    assert case.compare(ForwardKL()) < 1e-5


def test_masks_and_weights(target: Target) -> None:
    torch.manual_seed(2)
    more: dict[str, Any] = {"mask_BN": torch.rand(3, 21) < 0.7, "weight_BN": torch.rand(3, 21)}
    assert Case(target, head="own").compare(ForwardKL(), **more) < 1e-5


@pytest.mark.parametrize("loss", [ForwardKL(), TVDPlusPlus(), CrossEntropy()])
def test_a_stored_target_in_buckets(target: Target, loss: RowLoss) -> None:
    case = Case(target, head="own")
    p = case.teacher.rows(case.lesson.final_Ud, None).logp_ND.exp()
    named_UK, ids_UK = p.topk(5)
    logp = torch.cat([named_UK, 1 - named_UK.sum(-1, keepdim=True)], -1).log()
    case.lesson = replace(case.lesson, target=TargetRows(logp, ids_UK))
    case.teacher = None  # type: ignore[assignment]
    assert case.compare(loss) < 1e-5


def test_features_get_their_gradient(target: Target) -> None:
    """Alone and beside a loss of the logits; clamp(g - f, -1, 1) / d at the rows that count."""
    case = Case(target, head="own")
    feature = (case.states[0].detach() + torch.randn_like(case.states[0])).requires_grad_()
    both = WeightedSum(
        terms={
            "feature": Term(weight=1.0, loss=SmoothL1()),
            "ce": Term(weight=0.1, loss=CrossEntropy()),
        }
    )
    assert case.compare(both, feature_BNd=feature) < 1e-5
    depth = replace(case.depths(feature_BNd=feature)[0], weight_BN=None)
    sums = chunked_loss(
        depths=[depth],
        lesson=case.lesson,
        loss=SmoothL1(),
        projection=case.teacher,
        depth_decay=1.0,
        chunk_rows=7,
    )
    (grad,) = torch.autograd.grad(sums.total, [feature])
    expected = torch.zeros(63, 32)
    for u, flat in enumerate(case.lesson.index_U.tolist()):
        if flat % 21 >= 1:  # shift 1: the state one position earlier predicts f at this one
            error = feature.detach().flatten(0, 1)[flat - 1] - case.lesson.final_Ud[u]
            expected[flat - 1] = error.clamp(-1, 1) / 32
    torch.testing.assert_close(grad.flatten(0, 1), expected)


def test_a_drafter_without_features_cannot_learn_them(target: Target) -> None:
    case = Case(target, head="own")
    with pytest.raises(ValueError, match="predicts none"):
        case.compare(SmoothL1())


def test_statistics_are_added_up_over_processes(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process with alpha = 1 on 1000 rows pushes the mean up and the share of KL down."""
    case = Case(target, head="own")

    def loss_of(**more: Any) -> float:
        sums = chunked_loss(
            depths=case.depths()[:1],
            lesson=case.lesson,
            loss=LKLambda(alpha="batch"),
            projection=case.teacher,
            depth_decay=1.0,
            chunk_rows=7,
            **more,
        )
        return sums.total.item()

    alone = loss_of()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: sums.add_(1e9))
    assert loss_of(all_ranks=False) == pytest.approx(alone)
    p_share = torch.tensor(-3.0).exp().item()
    monkeypatch.undo()

    def fixed(loss: RowLoss) -> float:
        return chunked_loss(
            depths=case.depths()[:1],
            lesson=case.lesson,
            loss=loss,
            projection=case.teacher,
            depth_decay=1.0,
            chunk_rows=7,
        ).total.item()

    from train.losses import TVD

    expected = p_share * fixed(ForwardKL()) + (1 - p_share) * fixed(TVD())
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: sums.add_(1e9))
    assert loss_of() == pytest.approx(expected, rel=1e-4)


def test_duplicating_the_batch_leaves_the_mean(target: Target) -> None:
    """Rows twice: twice the loss, twice the rows, the same statistics."""
    case = Case(target, head="own")
    for loss in (ForwardKL(), TVDPlusPlus(), LKLambda(alpha="batch")):
        common: dict[str, Any] = {
            "loss": loss,
            "projection": case.teacher,
            "depth_decay": 1.0,
            "chunk_rows": 7,
        }
        once = chunked_loss(depths=case.depths(), lesson=case.lesson, **common)
        old = case.lesson
        twice = Lesson(
            shape=(6, 21),
            index_U=torch.cat([old.index_U, old.index_U + 63]),
            label_U=old.label_U.repeat(2),
            final_Ud=old.final_Ud.repeat(2, 1),
            logz_U=None,
        )
        doubled = [replace(d, states_BNd=d.states_BNd.repeat(2, 1, 1)) for d in case.depths()]
        sums = chunked_loss(depths=doubled, lesson=twice, **common)
        assert sums.count_K.tolist() == (2 * once.count_K).tolist()
        torch.testing.assert_close(sums.loss_K, 2 * once.loss_K, rtol=1e-4, atol=1e-5)


def test_the_order_of_sequences_and_more_padding_change_nothing(target: Target) -> None:
    torch.manual_seed(8)
    tokens_BT = torch.randint(0, 300, (3, 12))
    learn_BT = torch.rand(3, 12) < 0.6
    drafter = toy.medusa(target)
    teacher = toy.teacher(target, drafter)

    def loss_of(tokens: Tensor, learn: Tensor) -> Tensor:
        features = target.forward(tokens)
        lesson = make_lesson(
            tokens_BT=tokens,
            learn_BT=learn,
            final_BTd=features.final_BTd,
            logz_BT=None,
            draft_ids_D=drafter.draft_ids_D,
            vocab_size=drafter.vocab_size,
        )
        return chunked_loss(
            depths=list(drafter.unroll(features, tokens)),
            lesson=lesson,
            loss=LKLambda(alpha="batch"),
            projection=teacher,
            depth_decay=1.0,
            chunk_rows=5,
        ).loss_K

    value = loss_of(tokens_BT, learn_BT)
    order = [2, 0, 1]
    torch.testing.assert_close(loss_of(tokens_BT[order], learn_BT[order]), value)
    padded = torch.cat([tokens_BT, torch.full((3, 4), 2)], -1)
    ignored = torch.cat([learn_BT, torch.zeros(3, 4, dtype=torch.bool)], -1)
    torch.testing.assert_close(loss_of(padded, ignored), value, rtol=1e-4, atol=1e-4)


def test_a_drafter_is_differentiated_once(target: Target) -> None:
    case = Case(target, head="own")
    common: dict[str, Any] = {
        "depths": case.depths(), "lesson": case.lesson, "loss": CrossEntropy(),
        "projection": case.teacher, "depth_decay": 1.0, "chunk_rows": 7,
    }  # fmt: skip
    sums = chunked_loss(**common)
    case.gradients(sums)
    with pytest.raises((AssertionError, RuntimeError)):
        case.gradients(sums)
    with torch.no_grad():
        assert not chunked_loss(**common).total.requires_grad
