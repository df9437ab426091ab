"""Weightings on blocks made by hand.

Shape legend: B sequences, N states, K depths, d hidden size.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.drafter.base import Depth
from models.head.own import OwnHead
from models.target import Features, Target
from tests.train import toy
from train.chunked import chunked_loss
from train.data import Batch
from train.lesson import make_lesson, rows_of
from train.losses import ForwardKL
from train.module import DraftModule
from train.weighting import AdaSpec, DPace, Situation, ValidPrefix, Weighting

T = 7
LEARNED = [2, 3, 4, 5, 6]


def block_situation(q_of_label_KT: list[list[float]], **depth: Any) -> Situation:
    """Token t is t. Depth k (shift 1+k) gives its label x_{t+2+k} at state t the stated chance.

    A state is the log of q over the vocabulary of T tokens; the head is the identity.
    """
    learn_BT = torch.zeros(1, T, dtype=torch.bool)
    learn_BT[0, LEARNED] = True
    tokens_BT = torch.arange(T)[None]
    head = OwnHead(hidden_size=T, vocab_size=T)
    nn.init.eye_(head.linear.weight)
    depths = []
    for k, chances in enumerate(q_of_label_KT):
        q_TT = torch.ones(T, T) / T
        for t, chance in enumerate(chances):
            if t + 2 + k < T:
                q_TT[t] = (1 - chance) / (T - 1)
                q_TT[t, t + 2 + k] = chance
        depths.append(Depth(q_TT.clamp(min=1e-9).log()[None], head, shift=1 + k, **depth))
    lesson = make_lesson(
        tokens_BT=tokens_BT,
        learn_BT=learn_BT,
        final_BTd=torch.zeros(1, T, T),
        logz_BT=None,
        draft_ids_D=None,
        vocab_size=T,
    )
    features = Features(torch.zeros(1, T, T))
    return Situation(depths, lesson, None, 2, features, tokens_BT)  # type: ignore[arg-type]


def counted(weighting: Weighting, situation: Situation) -> list[list[int]]:
    """States t of each depth that still count."""
    return [rows_of(d, situation.lesson)[0].tolist() for d in weighting(situation)]


def test_d_pace_by_hand() -> None:
    """a = 0.5. Start t = 1: labels 3, 4, 5 with q = 1, 0.5, 0: s = 1, 0.75, 0.5; P = 1, 0.75,
    0.375; w = 2.125, 1.125, 0.375. Start t = 4: only label 6 exists: P = s = 0.6, w = 0.6."""
    chances = [[0.2, 1.0, 0.3, 0.9, 0.2], [0.1, 0.5, 0.4, 0.8], [0.3, 0.0, 0.6]]
    depths = DPace(smooth=0.5)(block_situation(chances))
    weights = [d.weight_BN for d in depths]
    assert all(w is not None for w in weights)
    at = torch.stack([w[0] for w in weights if w is not None])
    assert at[:, 1].tolist() == pytest.approx([2.125, 1.125, 0.375], abs=1e-5)
    assert at[0, 4].item() == pytest.approx(0.6, abs=1e-5)


def test_d_pace_passes_over_slots_that_do_not_count() -> None:
    """Depth 1 is masked at t = 1: s counts as 1 there and the slot has no term in the sum."""
    chances = [[0.2, 1.0], [0.1, 0.5], [0.3, 0.0]]
    situation = block_situation(chances)
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, 1] = False
    situation.depths[1].__dict__["mask_BN"] = mask
    at = torch.stack([d.weight_BN[0, 1] for d in DPace()(situation) if d.weight_BN is not None])
    assert at.tolist() == pytest.approx([1.5, 0.5, 0.5], abs=1e-5)


def test_d_pace_multiplies_weights_that_are_there() -> None:
    chances = [[0.2, 1.0], [0.1, 0.5]]
    plain = DPace()(block_situation(chances))
    twice = DPace()(block_situation(chances, weight_BN=torch.full((1, T), 2.0)))
    for one, two in zip(plain, twice, strict=True):
        assert one.weight_BN is not None
        assert two.weight_BN is not None
        torch.testing.assert_close(two.weight_BN, 2 * one.weight_BN)


def test_valid_prefix_by_hand() -> None:
    """Right drafts (q > 1/2): depth 0 at t = 1, 3; depth 1 at t = 0, 1. Without weighting depth 0
    counts at t = 0..4, depth 1 at 0..3, depth 2 at 0..2. Behind a wrong depth 0 nothing is left;
    the first error itself counts."""
    chances = [[0.1, 0.9, 0.1, 0.9, 0.1], [0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.1]]
    assert counted(ValidPrefix(), block_situation(chances)) == [[0, 1, 2, 3, 4], [1, 3], [1]]


def test_valid_prefix_keeps_an_earlier_mask() -> None:
    """t = 3 is masked everywhere; a masked slot breaks no block elsewhere."""
    chances = [[0.1, 0.9, 0.1, 0.9, 0.1], [0.9, 0.9, 0.1, 0.1]]
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, 3] = False
    found = counted(ValidPrefix(), block_situation(chances, mask_BN=mask))
    assert found == [[0, 1, 2, 4], [1]]


def test_valid_prefix_may_take_any_of_the_most_likely_tokens() -> None:
    """Every label of depth 0 is its second choice, and of depth 1 its first."""
    situation = block_situation([[0.3] * 5, [0.9] * 4])
    for t in range(5):
        situation.depths[0].states_BNd[0, t, t] = math.log(0.6)  # token t before the label t + 2
    assert counted(ValidPrefix(top=1), situation) == [[0, 1, 2, 3, 4], []]
    assert counted(ValidPrefix(top=2), situation) == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="at least 1"):
        ValidPrefix(top=0)


# --- AdaSPEC --------------------------------------------------------------------------------------


def real_situation(target: Target, drafter: Any) -> Situation:
    torch.manual_seed(5)
    tokens_BT = torch.randint(0, 300, (3, 21))
    features = target.forward(tokens_BT)
    lesson = make_lesson(
        tokens_BT=tokens_BT,
        learn_BT=torch.rand(3, 21) < 0.6,
        final_BTd=features.final_BTd,
        logz_BT=None,
        draft_ids_D=drafter.draft_ids_D,
        vocab_size=drafter.vocab_size,
    )
    depths = list(drafter.unroll(features, tokens_BT))
    return Situation(depths, lesson, toy.teacher(target, drafter), 7, features, tokens_BT)


def divergences(situation: Situation, depth: Depth) -> dict[int, float]:
    """KL(p || q) of each state of a depth that counts, the plain way."""
    state_N, teacher_N = rows_of(depth, situation.lesson)
    p = situation.projection.rows(situation.lesson.final_Ud, None).take(teacher_N)
    logq = depth.head(depth.states_BNd.flatten(0, 1)[state_N]).log_softmax(-1)
    kl: Tensor = (p.p_ND * (p.logp_ND - logq)).sum(-1)
    return dict(zip(state_N.tolist(), kl.tolist(), strict=True))


@pytest.mark.parametrize("keep", [0.4, 0.15, 1.0])
def test_ada_spec_keeps_the_largest_excess(target: Target, tmp_path: Path, keep: float) -> None:
    """ceil(keep n) rows of each depth, those with the largest KL(q) - KL(q_reference)."""
    drafter = toy.medusa(target)
    drafter.save_pretrained(tmp_path)
    with torch.no_grad():
        for p in drafter.parameters():
            p += 0.1 * torch.randn_like(p)
    weighting = AdaSpec(reference=str(tmp_path), target=target, keep=keep)
    weighting.check(drafter)
    situation = real_situation(target, drafter)
    reference = list(weighting.reference.unroll(situation.features, situation.tokens_BT))
    chosen = weighting(situation)
    for own, other, made in zip(situation.depths, reference, chosen, strict=True):
        ours, theirs = divergences(situation, own), divergences(situation, other)
        excess = {state: ours[state] - theirs[state] for state in ours}
        count = -int(-keep * len(excess) // 1)
        best = sorted(excess, key=lambda s: -excess[s])[:count]
        assert sorted(rows_of(made, situation.lesson)[0].tolist()) == sorted(best)
        assert made.weight_BN is not None
        assert made.weight_BN.flatten()[best].tolist() == pytest.approx(
            [len(excess) / count] * count
        )


def test_ada_spec_against_itself_is_the_whole_loss(target: Target, tmp_path: Path) -> None:
    """A drafter equal to its reference: all rows tie, all are kept."""
    drafter = toy.medusa(target)
    drafter.save_pretrained(tmp_path)
    weighting = AdaSpec(reference=str(tmp_path), target=target)
    situation = real_situation(target, drafter)
    for made, own in zip(weighting(situation), situation.depths, strict=True):
        assert len(rows_of(made, situation.lesson)[0]) == len(rows_of(own, situation.lesson)[0])


def test_ada_spec_trains_on_the_drafter_alone(target: Target, tmp_path: Path) -> None:
    drafter = toy.medusa(target)
    drafter.save_pretrained(tmp_path)
    weighting = AdaSpec(reference=str(tmp_path), target=target)
    situation = real_situation(target, drafter)
    sums = chunked_loss(
        depths=weighting(situation),
        lesson=situation.lesson,
        loss=ForwardKL(),
        projection=situation.projection,
        depth_decay=1.0,
        chunk_rows=7,
    )
    sums.total.backward()
    assert all(p.grad is not None for p in drafter.parameters())
    assert all(p.grad is None for p in weighting.reference.parameters())


# --- mistakes -------------------------------------------------------------------------------------


def test_a_reference_of_another_kind_is_refused(target: Target, tmp_path: Path) -> None:
    toy.medusa(target).save_pretrained(tmp_path)
    weighting = AdaSpec(reference=str(tmp_path), target=target)
    with pytest.raises(ValueError, match="another class"):
        weighting.check(toy.hydra(target))
    with pytest.raises(ValueError, match="another draft vocabulary"):
        weighting.check(toy.medusa(target, vocab=None))
    other = toy.medusa(target)
    other.set_vocab(torch.arange(64))
    with pytest.raises(ValueError, match="drafts over other tokens"):
        weighting.check(other)


def test_numbers_out_of_range_are_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share of tokens"):
        AdaSpec(reference=str(tmp_path), target=target, keep=0.0)
    with pytest.raises(ValueError, match="There is no drafter"):
        AdaSpec(reference=str(tmp_path), target=target)
    with pytest.raises(ValueError, match="between 0 and 1"):
        DPace(smooth=1.5)


@pytest.mark.parametrize("weighting", [DPace(), ValidPrefix()])
def test_one_draft_a_position_is_no_block(target: Target, weighting: Weighting) -> None:
    weighting.check(toy.medusa(target))

    class OneDepth(type(toy.medusa(target))):
        reads_features = False

        @property
        def max_depth(self) -> int | None:
            return None

    drafter = toy.medusa(target)
    drafter.__class__ = OneDepth
    with pytest.raises(ValueError, match="one draft a position"):
        weighting.check(drafter)


# --- in a run -------------------------------------------------------------------------------------


def test_training_is_weighed_and_validation_is_not(target: Target) -> None:
    drafter = toy.medusa(target)
    module = DraftModule(
        drafter=drafter,
        teacher=toy.teacher(target, drafter),
        loss=ForwardKL(),
        make_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        make_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o),
        weighting=DPace(),
    )
    tokens_BT = torch.randint(0, 300, (2, 15))
    batch = Batch(
        tokens_BT=tokens_BT,
        learn_BT=torch.ones(2, 15, dtype=torch.bool),
        normalizer=30,
        learned=30,
        features=target.forward(tokens_BT),
    )
    assert all(d.weight_BN is not None for d in module.train().prepare(batch)[0])
    assert all(d.weight_BN is None for d in module.eval().prepare(batch)[0])
