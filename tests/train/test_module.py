"""The module with a real Trainer on a tiny target."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from models.drafter.base import Drafter
from models.target import Target
from tests.train import toy
from train.data import TrainData
from train.losses import CrossEntropy, ForwardKL, Term, WeightedSum
from train.module import DraftModule, parameter_groups
from train.schedule import warmup_cosine
from train.trainer import make_trainer

LOSS = WeightedSum(
    terms={
        "kl": Term(weight=1.0, loss=ForwardKL()),
        "ce": Term(weight=0.1, loss=CrossEntropy()),
    }
)


def run(
    target: Target,
    drafter: Drafter,
    tmp_path: Path,
    *,
    shards: bool = False,
    accumulate: int = 1,
    callbacks: Any = (),
    precision: Any = "float32",
    **data_settings: Any,
) -> DraftModule:
    """Train and return the module."""
    source = target if shards else None
    data = TrainData(
        **{
            "train": toy.ToyReader(toy.examples(24), source),
            "val": toy.ToyReader(toy.examples(6, seed=9), source),
            "seed": 0,
            "epochs": 1,
            "tokens_per_batch": 120,
            "accumulate": accumulate,
            "online": not shards,
            "num_depths": drafter.num_depths,
            "reads_history": drafter.reads_history,
        }
        | data_settings
    )
    module = DraftModule(
        drafter=drafter,
        teacher=toy.teacher(target, drafter),
        loss=LOSS,
        depth_decay=0.9,
        chunk_rows=16,
        make_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05),
        make_scheduler=lambda o: warmup_cosine(optimizer=o, total_steps=data.total_steps),
    )
    trainer = make_trainer(
        target=target,
        data=data,
        run_dir=tmp_path,
        callbacks=list(callbacks),
        loggers=[],
        accumulate=accumulate,
        clip_norm=None,
        precision=precision,
    )
    trainer.fit(module, datamodule=data)
    return module


class Losses(pl.Callback):
    """The loss of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.ends_step:
            self.seen.append(float(trainer.callback_metrics["train/loss"]))


def weights(module: DraftModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.drafter.parameters()])


def test_accumulation_changes_nothing(target: Target, tmp_path: Path) -> None:
    """Eight examples at once, or one by one in eight micro-batches of very different length."""
    readers = toy.examples(8, answer=30)
    together = {"train": toy.ToyReader(readers), "tokens_per_batch": 10_000}
    drafter = toy.hydra(target)
    losses = Losses()
    at_once = run(target, copy.deepcopy(drafter), tmp_path, callbacks=[losses], **together)
    singly_losses = Losses()
    longest = max(e.tokens.numel() for e in readers)

    class OneByOne(TrainData):
        def _make_plan(self, epochs: int | None, max_steps: int | None) -> Any:
            plan = super()._make_plan(epochs, max_steps)
            return [type(p)((i,), p.epoch) for p in plan for i in p.examples]

    import tests.train.test_module as here

    original, here.TrainData = here.TrainData, OneByOne  # type: ignore[misc]
    try:
        singly = run(
            target,
            copy.deepcopy(drafter),
            tmp_path,
            accumulate=8,
            callbacks=[singly_losses],
            train=toy.ToyReader(readers),
            tokens_per_batch=8 * longest,
        )
    finally:
        here.TrainData = original  # type: ignore[misc]
    assert len(losses.seen) == len(singly_losses.seen) == 1
    assert singly_losses.seen == pytest.approx(losses.seen, rel=1e-5)
    start = torch.cat([p.detach().flatten() for p in drafter.parameters()])
    moved = (weights(at_once) - start).norm()
    assert moved > 0
    assert (weights(singly) - weights(at_once)).norm() < 1e-5 * moved


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("family", [toy.medusa, toy.hydra])
def test_trimming_changes_nothing(
    target: Target, tmp_path: Path, family: Any, shards: bool
) -> None:
    """Leaving out prompt positions of drafters that read no history: the same losses, weights."""
    drafter = family(target)
    assert not drafter.reads_history
    examples = toy.examples(12, prompt=40)
    seen, ends = [], []
    for reads_history in (True, False):
        losses = Losses()
        module = run(
            target,
            copy.deepcopy(drafter),
            tmp_path,
            shards=shards,
            callbacks=[losses],
            train=toy.ToyReader(examples, target if shards else None),
            tokens_per_batch=100_000,
            epochs=3,
            reads_history=reads_history,
        )
        seen.append(losses.seen)
        ends.append(weights(module))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_the_window_is_shorter(target: Target) -> None:
    example = toy.examples(1, prompt=400, seed=3)
    sizes = []
    for reads_history in (True, False):
        data = TrainData(
            train=toy.ToyReader(example),
            val=toy.ToyReader([]),
            seed=0,
            epochs=1,
            num_depths=3,
            reads_history=reads_history,
        )
        sizes.append(data.train_batch(0).tokens_BT.shape[1])
    first = int(example[0].learn.nonzero()[0, 0])
    assert sizes[0] - sizes[1] == first - 4


def test_a_prefix_layer_reads_history(target: Target) -> None:
    assert toy.hydra(target, prefix_layer=True).reads_history


def test_shards_and_online_teach_the_same(target: Target, tmp_path: Path) -> None:
    drafter = toy.hydra(target, prefix_layer=True)
    seen = []
    for shards in (True, False):
        losses = Losses()
        run(target, copy.deepcopy(drafter), tmp_path, shards=shards, callbacks=[losses])
        seen.append(losses.seen)
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_bf16_follows_fp32(target: Target, tmp_path: Path) -> None:
    drafter = toy.hydra(target)
    seen = []
    for precision in ("float32", "bfloat16"):
        losses = Losses()
        module = run(
            target, copy.deepcopy(drafter), tmp_path, callbacks=[losses], precision=precision
        )
        assert {p.dtype for p in module.drafter.parameters()} == {torch.float32}
        seen.append(losses.seen)
    assert seen[0] == pytest.approx(seen[1], rel=2e-2)
    assert seen[0] != seen[1]


def test_training_lowers_the_loss_and_leaves_the_target_alone(
    target: Target, tmp_path: Path
) -> None:
    before, losses = target.fingerprint(), Losses()
    module = run(target, toy.hydra(target), tmp_path, callbacks=[losses], epochs=12)
    assert losses.seen[-1] < 0.9 * losses.seen[0]
    assert target.fingerprint() == before
    assert all(name.startswith("drafter.") for name in module.state_dict())
    trained = sum(p.numel() for g in parameter_groups(module.drafter) for p in g["params"])
    assert trained == sum(p.numel() for p in module.drafter.parameters())


def test_norms_and_biases_do_not_decay(target: Target) -> None:
    drafter = toy.hydra(target, prefix_layer=True)
    decayed, free = parameter_groups(drafter)
    assert "weight_decay" not in decayed
    assert free["weight_decay"] == 0.0
    names = {id(p): n for n, p in drafter.named_parameters()}
    free_names = {names[id(p)] for p in free["params"]}
    assert all("norm" in n or n.endswith("bias") for n in free_names)
    assert any("norm" in n for n in free_names)
    assert all(p.ndim == 2 for p in decayed["params"])
