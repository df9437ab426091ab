"""What counts in the loss, on a text worked out by hand.

Shape legend: B sequences, T positions.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.target import Target
from tests.train import toy
from train.data import Batch
from train.lesson import Lesson, make_lesson, rows_of
from train.losses import ForwardKL
from train.module import DraftModule

# Token t is 100 + t. An answer on positions 4..7, two tokens of template behind it, and a second
# sequence that is an answer from its first token to its last.
LEARN = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
TOKENS = 100 + torch.arange(10).repeat(2, 1)


def _lesson(lag: int) -> Lesson:
    return make_lesson(
        tokens_BT=TOKENS,
        learn_BT=LEARN,
        final_BTd=torch.zeros(2, 10, 1),
        logz_BT=None,
        draft_ids_D=None,
        vocab_size=200,
        mask_lag=lag,
    )


@pytest.mark.parametrize(
    ("lag", "labels", "whole"),
    [
        (0, [104, 105, 106, 107], range(101, 110)),  # exactly the tokens to learn
        (1, [105, 106, 107, 108], range(101, 110)),
        # EAGLE's code: misses the first two answer tokens, learns two of the template.
        (2, [106, 107, 108, 109], range(102, 110)),
        (3, [107, 108, 109], range(103, 110)),  # token 110 does not exist
    ],
)
def test_a_mask_that_lags_behind_its_labels(lag: int, labels: list[int], whole: range) -> None:
    lesson = _lesson(lag)
    assert lesson.label_U.tolist() == [*labels, *whole]
    # Position u teaches x_{u+1}: in the first sequence u = label - 101.
    assert lesson.index_U[: len(labels)].tolist() == [label - 101 for label in labels]


def test_eagles_mask_is_that_of_the_state_itself() -> None:
    """Weighting the state at t by learn[t], though it predicts x_{t+2}, is a lag of 2."""
    depth: Any = SimpleNamespace(positions_BN=None, mask_BN=None, shift=1)
    state_N, _ = rows_of(depth, _lesson(2))
    counted_T = LEARN[0].clone()
    counted_T[8:] = False  # x_{t+2} does not exist
    assert state_N[state_N < 10].tolist() == counted_T.nonzero()[:, 0].tolist()


def _module(target: Target, **settings: Any) -> DraftModule:
    drafter = toy.hydra(target)
    return DraftModule(
        drafter=drafter,
        teacher=toy.teacher(target, drafter),
        loss=ForwardKL(),
        make_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        make_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o),
        **settings,
    )


def test_training_lags_and_validation_does_not(target: Target) -> None:
    module = _module(target, mask_lag=2)
    batch = Batch(
        tokens_BT=TOKENS,
        learn_BT=LEARN,
        features=target.forward(TOKENS),
        normalizer=14,
        learned=14,
    )
    module.train()
    assert torch.equal(module.prepare(batch)[1].index_U, _lesson(2).index_U)
    module.eval()
    assert torch.equal(module.prepare(batch)[1].index_U, _lesson(0).index_U)


def test_a_lag_that_cannot_be_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        _module(target, mask_lag=-1)
