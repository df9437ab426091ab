"""On-policy micro-batches: what is sampled, what is learned, how it is counted, what is resumed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.generate import Request
from models.drafter.base import Drafter
from models.target import Target
from tests.train import toy
from tests.train.toy_lm import ToyLm, chi_square_z
from train.data import Batch, TrainData
from train.losses import ForwardKL
from train.module import DraftModule
from train.onpolicy import OnPolicy, collate
from train.ring import Ring, Sampled, prompt_of
from train.schedule import warmup_cosine
from train.trainer import make_trainer
from train.writer import check_family


def plan(count: int = 24, *, source: Target | None = None, **settings: Any) -> TrainData:
    return TrainData(
        **{
            "train": toy.ToyReader(toy.examples(count), source),
            "val": toy.ToyReader(toy.examples(6, seed=9), source),
            "seed": 0,
            "epochs": 1,
            "tokens_per_batch": 120,
            "online": source is None,
        }
        | settings
    )


def policy(target: Target, **settings: Any) -> OnPolicy:
    return OnPolicy(**{"target": target, "seed": 0, "fraction": 1.0} | settings)


def sampled(
    onpolicy: OnPolicy,
    data: TrainData,
    drafter: Drafter,
    index: int,
    total: Callable[[int], int] = lambda n: n,
) -> Batch:
    return onpolicy.batch(
        data.train_batch(index), data=data, drafter=drafter, teacher=None, total=total
    )


# --- what is sampled and learned -----------------------------------------------------------------


def test_prompts_are_kept_and_exactly_the_samples_are_learned(target: Target) -> None:
    data, drafter = plan(), ToyLm(target=target, layers=2)
    onpolicy = policy(target, max_new_tokens=9)
    lengths = set()
    for index in range(len(data.mine)):
        batch = sampled(onpolicy, data, drafter, index)
        assert batch.tokens_BT.numel() <= data.tokens_per_batch
        assert batch.learned == int(batch.learn_BT.sum())
        for row, i in enumerate(data.mine[index].examples):
            example = data.train_reader[i]
            first = int(example.learn.nonzero()[0, 0])
            assert torch.equal(batch.tokens_BT[row, :first], example.tokens[:first])
            learn = batch.learn_BT[row]
            stop = first + int(learn.sum())
            assert learn.tolist() == [first <= t < stop for t in range(len(learn))]
            made = batch.tokens_BT[row, first:stop].tolist()
            room = data.tokens_per_batch // len(data.mine[index].examples) - first
            ended = made[-1] in target.eos_ids
            assert not set(made[:-1]) & set(target.eos_ids)
            assert ended or len(made) == min(9, room)
            lengths.add(len(made))
    assert len(lengths) > 3
    assert onpolicy.take_counts()["train/sampled_tokens"] == onpolicy.totals.sampled > 0


def test_prompt_of_a_sequence_that_is_learned_from_the_start() -> None:
    """Token 0 has no teacher, so it is the prompt even where it is marked."""
    assert prompt_of(torch.tensor([5, 6, 7]), torch.tensor([True, True, True])) == [5]
    assert prompt_of(torch.tensor([5, 6, 7]), torch.tensor([False, False, True])) == [5, 6]


def test_samples_follow_the_drafter(target: Target) -> None:
    """Chi-square over two sampled tokens, 3,000 draws each, from a draft vocabulary of 12."""
    drafter, prompt, draws = ToyLm(target=target, layers=2, vocab=12, dropout=0.5), [7, 20], 3000
    made = policy(target).writer.write(
        [
            Request(id=str(i), tokens=prompt, max_new_tokens=2, temperature=1.0, seed=i)
            for i in range(draws)
        ],
        drafter,
    )
    first = [int(s.tokens[2]) for s in made.values()]
    assert max(first) < 12
    assert chi_square_z(first, law(drafter, prompt)) < 4.0
    # After the most frequent first token that does not end the answer.
    common = max(set(first) - set(target.eos_ids), key=first.count)
    second = [int(s.tokens[3]) for s in made.values() if int(s.tokens[2]) == common]
    assert len(second) > 150
    assert chi_square_z(second, law(drafter, [*prompt, common])) < 4.0
    # The test can tell: the law after another prompt does not fit.
    assert chi_square_z(first, law(drafter, [8, 21])) > 10.0


def law(drafter: ToyLm, tokens: list[int]) -> Tensor:
    """q(. | tokens) without dropout, over the draft vocabulary."""
    with torch.no_grad():
        quiet = copy.deepcopy(drafter).eval()
        quiet._bound = drafter._bound
        return quiet.head(0)(quiet.read(torch.tensor([tokens]))[0, -1]).softmax(-1)


def test_a_copy_of_the_target_has_no_loss_on_its_own_text(target: Target, tmp_path: Path) -> None:
    """Mask, shift and teacher agree: any slip by one gives the tiny target a loss of several nats.

    The planned batches have their features from shards; the samples are read by the target.
    """
    losses = Losses()
    data = plan(source=target)
    drafter = ToyLm(target=target)
    fit(target, drafter, tmp_path, data, policy(target, max_new_tokens=8), callbacks=[losses])
    assert len(losses.seen) == data.total_steps > 3
    assert max(map(abs, losses.seen)) < 1e-5
    # Another drafter's does not vanish.
    losses = Losses()
    other = ToyLm(target=target, layers=2)
    fit(target, other, tmp_path, plan(source=target), policy(target), callbacks=[losses])
    assert min(losses.seen) > 0.1


def test_dropout_is_off_and_modes_and_random_state_are_left(target: Target) -> None:
    data, drafter = plan(), ToyLm(target=target, layers=2, dropout=0.5).train()
    drafter.decoder.eval()
    modes = [m.training for m in drafter.modules()]
    before = torch.get_rng_state()
    made = sampled(policy(target), data, drafter, 0)
    assert [m.training for m in drafter.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    again = sampled(policy(target), data, drafter.eval(), 0)
    assert torch.equal(made.tokens_BT, again.tokens_BT)


def test_a_reduced_vocabulary_that_is_no_prefix(target: Target) -> None:
    """Columns of the draft head are not target ids: what is written are target ids."""
    ids = torch.tensor([2, 9, 40, 77, 200, 299])
    drafter = ToyLm(target=target, layers=2, vocab=6)
    drafter.set_vocab(ids)
    for mode in ("draft", "interleaved"):
        onpolicy = policy(target, max_new_tokens=8, mode=mode, top_k=target.vocab_size)
        batch = sampled(onpolicy, plan(), drafter, 0)
        made = set(batch.tokens_BT[batch.learn_BT].tolist())
        assert made <= set(ids.tolist())
        assert len(made) > 3


def test_weights_are_cast_once_and_come_back(target: Target) -> None:
    """Under autocast sampling runs on bf16 weights; afterwards they are the same fp32 tensors."""
    drafter, data = ToyLm(target=target, layers=2), plan()
    before = [(p.data_ptr(), p.detach().clone()) for p in drafter.parameters()]
    seen = set()
    hook = drafter.own.register_forward_hook(
        lambda m, i, o: seen.add((next(m.parameters()).dtype, o.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        made = sampled(policy(target, temperature=0.0), data, drafter, 0)
    hook.remove()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    for (where, value), p in zip(before, drafter.parameters(), strict=True):
        assert p.data_ptr() == where
        assert torch.equal(p, value)
        assert p.dtype == torch.float32
    # The same text but for ties that rounding decides otherwise.
    fp32 = sampled(policy(target, temperature=0.0), data, drafter, 0)
    first = [(b.learn_BT.long().argmax(-1)) for b in (made, fp32)]
    assert torch.equal(first[0], first[1])
    rows = torch.arange(len(first[0]))
    same = made.tokens_BT[rows, first[0]] == fp32.tokens_BT[rows, first[1]]
    assert same.float().mean() > 0.7


# --- which micro-batches -------------------------------------------------------------------------


def test_the_fraction_is_kept_and_depends_on_seed_and_index_alone(target: Target) -> None:
    for fraction in (0.0, 0.3, 0.5, 1.0):
        chosen = [policy(target, fraction=fraction).chosen(i) for i in range(4000)]
        share = sum(chosen) / 4000
        assert share == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 4000) ** 0.5)
        assert chosen == [policy(target, fraction=fraction).chosen(i) for i in range(4000)]
    half, more = policy(target, fraction=0.5), policy(target, fraction=0.7)
    assert all(more.chosen(i) for i in range(4000) if half.chosen(i))
    other = policy(target, fraction=0.5, seed=1)
    assert [other.chosen(i) for i in range(99)] != [half.chosen(i) for i in range(99)]


def test_nothing_on_policy_is_training_without(target: Target, tmp_path: Path) -> None:
    drafter, seen = ToyLm(target=target, layers=2, dropout=0.2), []
    for onpolicy in (None, policy(target, fraction=0.0)):
        losses = Losses()
        own = copy.deepcopy(drafter)
        own.bind(target)
        fit(target, own, tmp_path, plan(), onpolicy, callbacks=[losses])
        seen.append(losses.seen)
    assert seen[0] == seen[1]


def test_a_mixture_reads_no_features_for_what_is_replaced(target: Target) -> None:
    onpolicy = policy(target, fraction=0.5)
    data = plan(source=target, sampled=onpolicy.chosen, tokens_per_batch=40)
    kinds = [data.train_batch(i).features is None for i in range(len(data.mine))]
    assert kinds == [onpolicy.chosen(i) for i in range(len(data.mine))]
    assert 0 < sum(kinds) < len(kinds)


# --- the normaliser ------------------------------------------------------------------------------


def test_accumulation_changes_nothing(target: Target, tmp_path: Path) -> None:
    """One micro-batch of 8 examples, or 8 of one: the same gradient, whatever lengths come out.

    Greedy, because the noise belongs to a place in the plan.
    """
    drafter, start = ToyLm(target=target, layers=2), None
    ends, seen = [], []
    for together in (True, False):
        losses, own = Losses(), copy.deepcopy(drafter)
        own.bind(target)
        start = weights(own)
        accumulate = 1 if together else 8
        data = plan(8, tokens_per_batch=10_000, accumulate=accumulate)
        if not together:
            data.plan = [type(p)((i,), p.epoch) for p in data.plan for i in p.examples]
            data.mine = data.plan
        onpolicy = policy(target, temperature=0.0, max_new_tokens=12)
        fit(target, own, tmp_path, data, onpolicy, callbacks=[losses], accumulate=accumulate)
        ends.append(weights(own))
        seen += losses.seen
    assert len(seen) == 2
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    moved = (ends[0] - start).norm()
    assert moved > 0
    assert (ends[0] - ends[1]).norm() < 1e-5 * moved


def test_normalizer_counts_the_whole_step_and_all_ranks(target: Target) -> None:
    """Two ranks with two micro-batches each; planned and sampled ones in one step."""
    drafter = ToyLm(target=target, layers=2)
    mixed = next(
        s
        for s in range(99)
        if sum(policy(target, fraction=0.5, seed=s).chosen(i) for i in (0, 1)) == 1
    )

    def run(total: Callable[[int, int], int]) -> list[list[Batch]]:
        ranks = []
        for rank in (0, 1):
            onpolicy = policy(target, fraction=0.5, seed=mixed)
            data = plan(tokens_per_batch=60, accumulate=2, rank=rank, world=2)
            ranks.append(
                [sampled(onpolicy, data, drafter, i, lambda n, r=rank: total(r, n)) for i in (0, 1)]
            )
        return ranks

    own = {}
    run(lambda rank, n: own.setdefault(rank, n))
    batches = run(lambda rank, n: own[0] + own[1])
    whole = sum(b.learned for rank in batches for b in rank)
    assert whole == own[0] + own[1]
    assert {b.normalizer for rank in batches for b in rank} == {whole}
    planned = plan(tokens_per_batch=60, accumulate=2, world=2).train_batch(0).normalizer
    assert planned != whole


# --- replay --------------------------------------------------------------------------------------


def sequence(length: int, mark: int) -> Sampled:
    return Sampled(torch.full((length,), mark), prompt=2)


def test_the_ring_forgets_the_oldest_and_survives_saving() -> None:
    ring = Ring(5)
    ring.add([sequence(3 + i, i) for i in range(8)])
    assert sorted(int(s.tokens[0]) for s in ring.items) == [3, 4, 5, 6, 7]
    again = Ring(5)
    again.load_state_dict(ring.state_dict())
    for one in (ring, again):
        one.add([sequence(4, 8)])
    assert again.oldest == ring.oldest
    for a, b in zip(ring.items, again.items, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert a.prompt == b.prompt
    assert sorted(int(s.tokens[0]) for s in again.items) == [4, 5, 6, 7, 8]
    empty = Ring(5)
    empty.load_state_dict(Ring(5).state_dict())
    assert empty.items == []


def test_the_ring_gives_neighbours_within_the_budget() -> None:
    ring = Ring(60)
    ring.add([sequence(3 + i % 30, i) for i in range(60)])
    picked = []
    for seed in range(400):
        rows = ring.pick(6, 60, np.random.default_rng(seed))
        lengths = [len(s.tokens) for s in rows]
        assert 1 <= len(rows) <= 6
        assert len(rows) * max(lengths) <= 60
        assert max(lengths) - min(lengths) <= 3
        assert len({int(s.tokens[0]) for s in rows}) == len(rows)
        picked += [int(s.tokens[0]) for s in rows]
    assert set(picked) == set(range(60))


def test_replayed_micro_batches_are_earlier_samples(target: Target) -> None:
    data, drafter = plan(60), ToyLm(target=target, layers=2)
    onpolicy = policy(target, replay={"size": 20, "share": 0.6}, max_new_tokens=6)
    earlier: set[tuple[int, ...]] = set()
    kinds = []
    for index in range(len(data.mine)):
        batch = sampled(onpolicy, data, drafter, index)
        counts = onpolicy.take_counts()
        old = counts["train/replayed_tokens"] > 0
        assert (counts["train/sampled_tokens"] > 0) != old
        assert batch.tokens_BT.numel() <= data.tokens_per_batch
        rows = set()
        for tokens, learn in zip(batch.tokens_BT, batch.learn_BT, strict=True):
            rows.add(tuple(tokens[: int(learn.nonzero()[-1, 0]) + 1].tolist()))
        assert old == (rows <= earlier)
        earlier |= rows
        kinds.append(old)
    assert not kinds[0]
    assert 0.3 < sum(kinds) / len(kinds) < 0.8
    assert len(onpolicy.ring.items) == 20  # type: ignore[union-attr]


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fraction": 1.5}, "onpolicy.fraction=1.5"),
        ({"replay": {"size": 8, "share": -0.1}}, r"onpolicy.replay.share=-0.1"),
        ({"replay": {"size": 0, "share": 0.1}}, r"onpolicy.replay.size=0"),
        ({"max_new_tokens": 0}, "onpolicy.max_new_tokens=0"),
        ({"temperature": -1.0}, "onpolicy.temperature=-1.0"),
    ],
)
def test_settings_that_make_no_sense(target: Target, settings: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        policy(target, **settings)


def test_a_family_that_reads_features_is_refused_by_its_name_alone() -> None:
    for name in ("medusa.Medusa", "hydra_heads.HydraHeads"):
        with pytest.raises(ValueError, match=r"reads_features = True.*drafter=causal_lm"):
            check_family({"_target_": f"models.drafter.{name}"})


def test_and_as_an_object(target: Target) -> None:
    drafter = toy.medusa(target)
    with pytest.raises(ValueError, match="Medusa has reads_features"):
        module(target, drafter, plan(), policy(target))


def test_collate_pads_behind() -> None:
    planned = Batch(torch.zeros(1, 1), torch.zeros(1, 1), 1, 1, index=7, ends_step=False, epoch=0.5)
    batch = collate([sequence(4, 8), sequence(3, 9)], planned, 11)
    assert batch.tokens_BT.tolist() == [[8, 8, 8, 8], [9, 9, 9, 0]]
    assert batch.learn_BT.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert (batch.learned, batch.normalizer, batch.index) == (3, 11, 7)
    assert (batch.ends_step, batch.epoch) == (False, 0.5)
    assert batch.context_BS is batch.tokens_BT


class Losses(pl.Callback):
    """The loss of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.ends_step:
            self.seen.append(float(trainer.callback_metrics["train/loss"]))


def weights(drafter: Drafter) -> Tensor:
    return torch.cat([p.detach().flatten() for p in drafter.parameters()])


def module(
    target: Target, drafter: Drafter, data: TrainData, onpolicy: OnPolicy | None
) -> DraftModule:
    return DraftModule(
        drafter=drafter,
        teacher=toy.teacher(target, drafter),
        loss=ForwardKL(),
        chunk_rows=16,
        onpolicy=onpolicy,
        make_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.02),
        make_scheduler=lambda o: warmup_cosine(optimizer=o, total_steps=data.total_steps),
    )


def fit(
    target: Target,
    drafter: Drafter,
    folder: Path,
    data: TrainData,
    onpolicy: OnPolicy | None,
    *,
    callbacks: list[Any],
    accumulate: int = 1,
) -> None:
    trainer = make_trainer(
        target=target,
        data=data,
        run_dir=folder,
        callbacks=callbacks,
        loggers=[],
        accumulate=accumulate,
        clip_norm=None,
        precision="float32",
    )
    trainer.fit(module(target, drafter, data, onpolicy), datamodule=data)
