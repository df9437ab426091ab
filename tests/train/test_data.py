from typing import Any

import pytest
import torch

from data_prep.shards import Example
from tests.train import toy
from train.data import TrainData, plan_epoch, window_of


def make(**settings: Any) -> TrainData:
    readers = {"train": toy.ToyReader(toy.examples(23)), "val": toy.ToyReader(toy.examples(5))}
    return TrainData(**{**readers, "seed": 3, "tokens_per_batch": 96, "epochs": 2} | settings)


def test_window_by_hand() -> None:
    learn = torch.zeros(20, dtype=torch.bool)
    learn[[10, 11, 13]] = True
    whole, cut = window_of(learn, None), window_of(learn, 4)
    assert (whole.start, whole.stop, whole.learned) == (0, 14, 3)
    assert (cut.start, cut.stop, cut.learned) == (6, 14, 3)
    # Three depths (lead 4): x_10 is the label at teacher position 9, which teaches t = 9 - 3 = 6.
    assert cut.start == 10 - 1 - 3


def test_token_zero_is_never_learned() -> None:
    assert window_of(torch.tensor([True, False]), None).learned == 0


def test_every_example_once_within_the_budget() -> None:
    costs = [e.tokens.numel() for e in toy.examples(50)]
    batches = plan_epoch(costs, 100, seed=0, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(50))
    assert max(len(b) * max(costs[i] for i in b) for b in batches) <= 100


def test_batches_hold_similar_lengths() -> None:
    """Padding stays below a fifth where random batches of these lengths waste a third and more."""
    costs = [1 + i % 60 for i in range(600)]
    batches = plan_epoch(costs, 480, seed=0, epoch=0)
    padded = sum(len(b) * max(costs[i] for i in b) for b in batches)
    assert sum(costs) / padded > 0.8


def test_order_depends_on_seed_and_epoch_alone() -> None:
    costs = [5 + i % 7 for i in range(40)]
    first = plan_epoch(costs, 60, seed=1, epoch=2)
    assert plan_epoch(costs, 60, seed=1, epoch=2) == first
    assert plan_epoch(costs, 60, seed=1, epoch=3) != first
    assert plan_epoch(costs, 60, seed=2, epoch=2) != first


def test_example_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_batch=10 is too small for example 1"):
        plan_epoch([4, 11], 10, seed=0, epoch=0)


def test_normaliser_counts_the_whole_step() -> None:
    data = make(accumulate=3)
    batches = [data.train_batch(i) for i in range(len(data.mine))]
    for i in range(0, len(batches), 3):
        group = batches[i : i + 3]
        total = sum(b.learned for b in group)
        assert [b.normalizer for b in group] == [total] * len(group)
        assert [b.ends_step for b in group] == [False] * (len(group) - 1) + [True]
    assert sum(b.learned for b in batches) == data.learned_total
    assert data.total_steps == -(-len(batches) // 3)


def test_learned_counts_the_labels_in_the_batch() -> None:
    data = make()
    batch = data.train_batch(0)
    assert int(batch.learn_BT[:, 1:].sum()) == batch.learned


def test_ranks_share_the_plan() -> None:
    """Two ranks see what one rank sees, each batch once, with the same normalisers."""
    alone = make(accumulate=2)
    pair = [make(world=2, rank=r) for r in range(2)]
    assert len(pair[0].mine) == len(pair[1].mine)
    for step in range(len(pair[0].mine)):
        group = [p.train_batch(step) for p in pair]
        assert group[0].normalizer == group[1].normalizer == sum(b.learned for b in group)
    seen = sorted(i for p in pair for b in p.mine for i in b.examples)
    assert seen == sorted(i for b in alone.mine for i in b.examples)


def test_max_steps_bounds_the_plan() -> None:
    data = make(epochs=None, max_steps=7, accumulate=2)
    assert (data.total_steps, len(data.mine)) == (7, 14)


def test_an_end_is_needed() -> None:
    with pytest.raises(ValueError, match="never end"):
        make(epochs=None)


def test_nothing_to_learn_is_refused() -> None:
    empty = Example(id="e", tokens=torch.arange(4), learn=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no token to learn"):
        make(train=toy.ToyReader([empty]))


def test_resuming_starts_behind_what_was_done() -> None:
    data, again = make(), make()
    again.load_state_dict({"taken": 3, "plan": data.plan_hash()})
    rest, all_batches = list(again.train_dataloader()), list(data.train_dataloader())
    assert [b.index for b in rest] == list(range(3, len(data.mine)))
    for ours, theirs in zip(rest, all_batches[3:], strict=True):
        assert torch.equal(ours.tokens_BT, theirs.tokens_BT)
    assert len(again.train_dataloader()) == len(data.mine)


def test_resuming_with_other_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="made with other batches"):
        make(seed=4).load_state_dict({"taken": 3, "plan": make().plan_hash()})
