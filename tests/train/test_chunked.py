from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.drafter.base import Depth, Drafter
from models.head.own import OwnHead
from models.target import Target
from tests.train import toy
from train.chunked import Lesson, LossSums, chunked_loss, make_lesson, plain_loss, rows_of
from train.losses import CrossEntropy, ForwardKL, RowLoss, Term, WeightedSum
from train.teacher import Teacher

BOTH = WeightedSum(
    terms={
        "kl": Term(weight=1.0, loss=ForwardKL()),
        "ce": Term(weight=0.3, loss=CrossEntropy()),
    }
)


def batch(target: Target, drafter: Drafter) -> tuple[Any, Tensor, Lesson]:
    torch.manual_seed(5)
    tokens_BT = torch.randint(0, 300, (3, 21))
    learn_BT = torch.rand(3, 21) < 0.6
    features = target.forward(tokens_BT)
    lesson = make_lesson(
        tokens_BT=tokens_BT,
        learn_BT=learn_BT,
        final_BTd=features.final_BTd,
        logz_BT=None,
        draft_ids_D=drafter.draft_ids_D,
        vocab_size=drafter.vocab_size,
    )
    return features, tokens_BT, lesson


def gradients(sums: LossSums, drafter: Drafter) -> dict[str, Tensor]:
    drafter.zero_grad()
    sums.total.backward()
    return {n: p.grad.clone() for n, p in drafter.named_parameters() if p.grad is not None}


def compare(
    drafter: Drafter, target: Target, loss: RowLoss, chunk_rows: int, *, bf16: bool = False
) -> tuple[LossSums, LossSums, dict[str, float]]:
    """Both ways, and the relative distance of each parameter's gradient (Frobenius)."""
    features, tokens_BT, lesson = batch(target, drafter)
    teacher = toy.teacher(target, drafter)
    common: dict[str, Any] = {
        "lesson": lesson,
        "loss": loss,
        "projection": teacher,
        "depth_decay": 0.8,
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        chunked = chunked_loss(
            depths=list(drafter.unroll(features, tokens_BT)), chunk_rows=chunk_rows, **common
        )
    ours = gradients(chunked, drafter)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        plain = plain_loss(depths=list(drafter.unroll(features, tokens_BT)), **common)
    theirs = gradients(plain, drafter)
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(list(drafter.parameters()))
    far = {n: float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in ours}
    return chunked, plain, far


@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL(), BOTH])
@pytest.mark.parametrize("vocab", [64, None])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_chunked_equals_plain_in_fp32(
    target: Target, loss: RowLoss, vocab: int | None, chunk_rows: int
) -> None:
    drafter = toy.hydra(target, vocab=vocab)
    chunked, plain, far = compare(drafter, target, loss, chunk_rows)
    assert chunked.total.item() == pytest.approx(plain.total.item(), rel=1e-5)
    torch.testing.assert_close(chunked.loss_K, plain.loss_K, rtol=1e-5, atol=1e-5)
    assert chunked.right_K.tolist() == plain.right_K.tolist()
    assert chunked.count_K.tolist() == plain.count_K.tolist()
    assert max(far.values()) < 1e-5, far


def test_chunked_equals_plain_under_bf16_autocast(target: Target) -> None:
    chunked, plain, far = compare(toy.hydra(target), target, BOTH, 7, bf16=True)
    assert chunked.total.item() == pytest.approx(plain.total.item(), rel=1e-2)
    assert max(far.values()) < 1e-2, far


def test_a_head_shared_by_all_depths_gets_all_gradients(target: Target) -> None:
    drafter = toy.medusa(target)
    for k in range(1, drafter.num_depths):
        heads = drafter.heads
        assert isinstance(heads, nn.ModuleList)
        heads[k] = heads[0]
    _, _, far = compare(drafter, target, ForwardKL(), 7)
    assert max(far.values()) < 1e-5, far


def test_the_outer_gradient_scales(target: Target) -> None:
    drafter = toy.medusa(target)
    features, tokens_BT, lesson = batch(target, drafter)

    def grads(factor: float) -> Tensor:
        drafter.zero_grad()
        sums = chunked_loss(
            depths=list(drafter.unroll(features, tokens_BT)),
            lesson=lesson,
            loss=CrossEntropy(),
            projection=toy.teacher(target, drafter),
            depth_decay=1.0,
            chunk_rows=8,
        )
        (factor * sums.total).backward()
        grad = drafter.head(1).linear.weight.grad  # type: ignore[union-attr]
        assert isinstance(grad, Tensor)
        return grad.clone()

    torch.testing.assert_close(grads(0.25), 0.25 * grads(1.0))


class WatchedHead(OwnHead):
    """Remembers how many rows it was given at once. No plain matrix, to the loss."""

    def __init__(self, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self.seen: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        self.seen.append(len(states))
        return super().forward(states)

    def matrix(self) -> Any:
        return None


def test_only_counted_rows_are_projected_in_chunks(target: Target) -> None:
    drafter = toy.medusa(target)
    features, _, lesson = batch(target, drafter)
    head = WatchedHead(hidden_size=32, vocab_size=64)
    depth = Depth(features.final_BTd, head, shift=1)
    with torch.no_grad():
        chunked_loss(
            depths=[depth],
            lesson=lesson,
            loss=CrossEntropy(),
            projection=toy.teacher(target, drafter),
            depth_decay=1.0,
            chunk_rows=6,
        )
    assert sum(head.seen) == len(rows_of(depth, lesson)[0])
    assert max(head.seen) <= 6


def table(shift: int, **depth: Any) -> list[tuple[int, int, int]]:
    """(t, u, label) of the rows of a toy sequence whose token at position i is i."""
    tokens_BT = torch.arange(10)[None]
    learn_BT = torch.zeros(1, 10, dtype=torch.bool)
    learn_BT[0, [0, 4, 5, 6, 9]] = True
    lesson = make_lesson(
        tokens_BT=tokens_BT,
        learn_BT=learn_BT,
        final_BTd=torch.zeros(1, 10, 2),
        logz_BT=None,
        draft_ids_D=None,
        vocab_size=10,
    )
    states = torch.zeros(1, 10, 2)
    head = OwnHead(hidden_size=2, vocab_size=10)
    state_N, teacher_N = rows_of(Depth(states, head, shift, **depth), lesson)
    return list(
        zip(
            state_N.tolist(),
            lesson.index_U[teacher_N].tolist(),
            lesson.label_U[teacher_N].tolist(),
            strict=True,
        )
    )


def test_mask_and_shift_by_hand() -> None:
    """Learned tokens 4, 5, 6, 9 (token 0 has no teacher): state t is taught at t+s, label t+s+1."""
    assert table(0) == [(3, 3, 4), (4, 4, 5), (5, 5, 6), (8, 8, 9)]
    assert table(1) == [(2, 3, 4), (3, 4, 5), (4, 5, 6), (7, 8, 9)]
    # Shift 4: the label of t = 0 is token 5, and token 4 would need t = -1.
    assert table(4) == [(0, 4, 5), (1, 5, 6), (4, 8, 9)]


def test_the_mask_rule_of_the_contract() -> None:
    """t counts iff t+s+1 < T and learn[t+s+1]."""
    learned = {4, 5, 6, 9, 0}
    for shift in range(12):
        expected = [t for t in range(10) if t + shift + 1 < 10 and t + shift + 1 in learned]
        assert [t for t, _, _ in table(shift)] == expected


def test_an_extra_mask_removes_states() -> None:
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[0, 3] = False
    assert table(1, mask_BN=mask) == [(2, 3, 4), (4, 5, 6), (7, 8, 9)]


def test_sampled_positions_find_their_teacher() -> None:
    """States at positions 7, 2, 5, 9: with shift 1 positions 7 and 2 count, in teacher order."""
    positions = torch.tensor([[7, 2, 5, 9]])
    assert table(1, positions_BN=positions) == [(1, 3, 4), (0, 8, 9)]


def test_labels_outside_the_draft_vocabulary(target: Target) -> None:
    """The draft vocabulary of the toy drafter is the even ids below 128."""
    drafter = toy.medusa(target)
    _, tokens_BT, lesson = batch(target, drafter)
    for flat, label in zip(lesson.index_U.tolist(), lesson.label_U.tolist(), strict=True):
        token = int(tokens_BT.flatten()[flat + 1])
        assert label == (token // 2 if token % 2 == 0 and token < 128 else -1)


def test_restricted_teacher_is_the_full_distribution_cut(target: Target) -> None:
    """log p_D = W[ids] f - logZ, not renormalised, with logZ in vocabulary chunks or given."""
    drafter = toy.medusa(target)
    _, _, lesson = batch(target, drafter)
    full = target.project(lesson.final_Ud).float().log_softmax(-1)[:, drafter.draft_ids_D]
    teacher: Teacher = toy.teacher(target, drafter)
    torch.testing.assert_close(teacher.rows(lesson.final_Ud, None).logp_ND, full)
    logz_U = target.project(lesson.final_Ud).float().logsumexp(-1)
    torch.testing.assert_close(teacher.rows(lesson.final_Ud, logz_U).logp_ND, full)
    assert bool((full.exp().sum(-1) < 0.99).any())
    _, best_U = teacher.full(lesson.final_Ud)
    assert best_U.tolist() == target.project(lesson.final_Ud).argmax(-1).tolist()


def test_a_perfect_draft_has_no_loss_only_at_the_right_shift(target: Target) -> None:
    """A state that is f_{t+s} with the target's head is q = p: zero loss at shift s alone."""
    drafter = toy.medusa(target, vocab=None)
    features, _, lesson = batch(target, drafter)
    head = OwnHead(hidden_size=32, vocab_size=target.vocab_size)
    head.init_from(target, None)
    copied_BTd = torch.zeros_like(features.final_BTd)
    copied_BTd[:, :-2] = features.final_BTd[:, 2:]
    sums = chunked_loss(
        depths=[Depth(copied_BTd, head, shift=s) for s in (1, 2, 3)],
        lesson=lesson,
        loss=ForwardKL(),
        projection=toy.teacher(target, drafter),
        depth_decay=1.0,
        chunk_rows=16,
    )
    per_row = (sums.loss_K / sums.count_K).tolist()
    assert per_row[1] == pytest.approx(0.0, abs=1e-5)
    assert min(per_row[0], per_row[2]) > 0.1


def test_weights_multiply_rows(target: Target) -> None:
    """Weights 0 and 1 act like a mask, except that the rows still count; 2 doubles."""
    drafter = toy.medusa(target)
    features, _, lesson = batch(target, drafter)
    head = drafter.head(0)
    torch.manual_seed(3)
    keep_BN = torch.rand(3, 21) < 0.5

    def loss_of(**depth: Any) -> tuple[float, float]:
        common: dict[str, Any] = {
            "depths": [Depth(features.final_BTd, head, 1, **depth)],
            "lesson": lesson,
            "loss": ForwardKL(),
            "projection": toy.teacher(target, drafter),
            "depth_decay": 1.0,
        }
        plain = plain_loss(**common)
        chunked = chunked_loss(chunk_rows=7, **common)
        assert chunked.total.item() == pytest.approx(plain.total.item(), rel=1e-5)
        return chunked.total.item(), float(chunked.count_K[0])

    masked, some = loss_of(mask_BN=keep_BN)
    weighted, all_of_them = loss_of(weight_BN=2.0 * keep_BN)
    assert weighted == pytest.approx(2 * masked, rel=1e-5)
    assert some < all_of_them
