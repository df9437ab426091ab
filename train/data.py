"""Batches: by length, within a token budget, in an order that depends on the seed alone.

All batches of a run are planned before the first step, over all epochs. A step takes the next
accumulate * world of them, and rank r the r-th, (r + world)-th, ... So the number of steps is
known, every step knows how many tokens it learns in all its micro-batches on all ranks (the
normaliser of its loss, without communication), and resuming is: go on at micro-batch number n of
the plan, on any number of ranks that shares the micro-batches of a step.

A sequence is cut to what can matter. Behind its last token to learn nothing is learned. Before the
first one, drafters that do not mix positions need only the 1 + num_depths positions whose states
may be taught by it. The online teacher still reads from the first token on.

Shape legend: B sequences, S context positions (from token 0), T positions of the training window,
d hidden size.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from data_prep.shards import Example
from data_prep.signal import SignalRows
from models.target import Features

LENGTH_NOISE = 0.1
"""Lengths are blurred by up to this share before sorting, so that batches differ by epoch."""


class Reader(Protocol):
    """What is needed of data_prep.shards.ShardReader."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...
    def features(self, index: int, layers: Sequence[int], /) -> tuple[Features, Tensor] | None: ...
    def signal(self, index: int, name: str, /) -> SignalRows: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded. Exactly one of `features`, `context_BS` and `signal` is given.

    `signal` has a row for each position that teaches, in their order: those u of the sequences, one
    sequence after the other, with learn[u+1] (a window holds all of its example's).

    `normalizer` is the number of tokens to learn in the whole optimizer step: all its micro-batches
    on all ranks. `index` counts this rank's micro-batches from the start of the run, `place` those
    of all ranks. `repeated` fills up a rank that has fewer to validate: it does not count.
    """

    tokens_BT: Tensor
    learn_BT: Tensor
    normalizer: int
    learned: int
    index: int = 0
    place: int = 0
    repeated: bool = False
    ends_step: bool = True
    epoch: float = 0.0
    features: Features | None = None
    logz_BT: Tensor | None = None
    context_BS: Tensor | None = None
    start_B: Tensor | None = None
    signal: SignalRows | None = None

    def to(self, device: torch.device, **_: Any) -> "Batch":
        """Move every tensor; Lightning calls this."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if self.features is not None:
            inner = {k: v.to(device) for k, v in self.features.layers.items()}
            moved["features"] = Features(self.features.final_BTd.to(device), inner)
        if self.signal is not None:
            moved["signal"] = self.signal.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class Window:
    """Which positions [start, stop) of an example are computed, and how many tokens it teaches."""

    start: int
    stop: int
    learned: int


@dataclass(frozen=True)
class Planned:
    """One micro-batch of the plan: which examples, and where it stands."""

    examples: tuple[int, ...]
    epoch: float


def window_of(learn_T: Tensor, lead: int | None) -> Window:
    """Positions that can matter for the loss of one example.

    The first token to learn, x_a, is the label of teacher position a-1, which teaches the states at
    a-1-s for shifts s up to the number of depths. So the window starts `lead` = 1 + num_depths
    before a; None (the drafter reads its history) starts at 0. Token 0 has no teacher and is never
    learned.
    """
    learned = learn_T[1:].nonzero()[:, 0] + 1
    if not len(learned):
        return Window(0, 0, 0)
    first, last = int(learned[0]), int(learned[-1])
    return Window(0 if lead is None else max(0, first - lead), last + 1, len(learned))


def plan_epoch(costs: Sequence[int], budget: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Batches of examples of similar length, at most `budget` padded tokens each, shuffled.

    The order is a function of (seed, epoch) alone.
    """
    rng = np.random.default_rng([seed, epoch])
    cost_N = np.asarray(costs)
    blurred_N = cost_N * (1.0 + LENGTH_NOISE * rng.random(len(cost_N)))
    batches: list[list[int]] = []
    longest = 0
    for i in blurred_N.argsort(kind="stable").tolist():
        if costs[i] == 0:
            continue
        if costs[i] > budget:
            raise ValueError(
                f"data.tokens_per_batch={budget} is too small for example {i} of the dataset, "
                f"which has {costs[i]} tokens; give at least that, or prepare shorter answers."
            )
        longest = max(longest, costs[i])
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = costs[i]
        batches[-1].append(i)
    return [batches[i] for i in rng.permutation(len(batches))]


class PlannedLoader:
    """Yields the batches of one rank from `start` on; its length is that of the whole plan."""

    def __init__(self, data: "TrainData") -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.mine)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.data.start, len(self)):
            yield self.data.train_batch(index)

    # Lightning asks resumable loaders for these; where to start is TrainData's state.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class ValLoader:
    """The validation batches of one rank, always in the same order."""

    def __init__(self, data: "TrainData", batches: list[list[int]]) -> None:
        self.data, self.batches = data, batches

    def __len__(self) -> int:
        return -(-len(self.batches) // self.data.world)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.batches), self.data.world):
            place = first + self.data.rank
            repeated = place >= len(self.batches)
            batch = self.data.val_batch(self.batches[-1 if repeated else place])
            yield replace(batch, repeated=repeated)


class TrainData(LightningDataModule):
    """Plans and makes the batches of a run.

    `epochs` and `max_steps` bound the plan (whichever comes first). `layers` are the inner layers
    to read from feature shards; `online` leaves features to the teacher, `sampled` says of which
    micro-batches besides (they are on-policy: their answers will be replaced). `signal` is read in
    place of features. `num_depths` and `reads_history` come from the drafter. `world` processes
    share each step; `setup` asks the trainer which of them this is.
    """

    def __init__(
        self,
        *,
        train: Reader,
        val: Reader,
        seed: int,
        tokens_per_batch: int = 8192,
        epochs: int | None = None,
        max_steps: int | None = None,
        accumulate: int = 1,
        online: bool = True,
        sampled: Callable[[int], bool] | None = None,
        layers: tuple[int, ...] = (),
        signal: str | None = None,
        num_depths: int = 1,
        reads_history: bool = True,
        rank: int = 0,
        world: int = 1,
        val_limit: int | None = None,
    ) -> None:
        super().__init__()
        if epochs is None and max_steps is None:
            raise ValueError(
                "trainer.epochs and trainer.max_steps are both null, so training would never end; "
                "give at least one of them."
            )
        self.train_reader, self.val_reader = train, val
        self.seed, self.tokens_per_batch = seed, tokens_per_batch
        self.accumulate, self.world = accumulate, world
        self.online, self.layers, self.signal = online, layers, signal
        self.sampled = sampled or (lambda _: False)
        self.lead = None if reads_history else 1 + num_depths
        self.windows = [window_of(train[i].learn, self.lead) for i in range(len(train))]
        if not any(w.learned for w in self.windows):
            raise ValueError(
                "The training split has no token to learn, expected at least one, because every "
                "learn mask is empty; look at it with `python -m data_prep show=5`."
            )
        count = len(val) if val_limit is None else min(val_limit, len(val))
        self.val_windows = [window_of(val[i].learn, self.lead) for i in range(count)]
        self.start = 0
        self.plan = self._make_plan(epochs, max_steps)
        self.take_rank(rank)

    def take_rank(self, rank: int) -> None:
        """Choose this process's part of the plan."""
        self.rank, self.mine = rank, self.plan[rank :: self.world]

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.take_rank(self.trainer.global_rank)

    # --- the plan --------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-len(self.plan) // (self.accumulate * self.world))

    def steps_per_epoch(self) -> float:
        """Optimizer steps of one pass over the data, on average."""
        return self.total_steps / self.plan[-1].epoch

    @property
    def learned_total(self) -> int:
        """Tokens learned over the whole run (each counted as often as it is seen)."""
        return sum(self._learned(p) for p in self.plan)

    def _make_plan(self, epochs: int | None, max_steps: int | None) -> list[Planned]:
        group = self.accumulate * self.world
        wanted = None if max_steps is None else max_steps * group
        costs = [self._cost(w) for w in self.windows]
        plan: list[Planned] = []
        epoch = 0
        while (epochs is None or epoch < epochs) and (wanted is None or len(plan) < wanted):
            batches = plan_epoch(costs, self.tokens_per_batch, seed=self.seed, epoch=epoch)
            done = np.arange(1, len(batches) + 1) / len(batches)
            plan += [
                Planned(tuple(b), round(epoch + float(d), 4))
                for b, d in zip(batches, done, strict=True)
            ]
            epoch += 1
        return _divisible(plan[:wanted], group, self.world)

    def _cost(self, window: Window) -> int:
        """Padded positions an example costs: the online teacher reads from token 0."""
        return window.stop if self.online else window.stop - window.start

    def _learned(self, planned: Planned) -> int:
        return sum(self.windows[i].learned for i in planned.examples)

    # --- batches ---------------------------------------------------------------------------------

    def train_batch(self, index: int) -> Batch:
        """Micro-batch number `index` of this rank."""
        step = index // self.accumulate
        group = self.accumulate * self.world
        together = self.plan[step * group : (step + 1) * group]
        examples = self.mine[index].examples
        online = self.online or self.sampled(index)
        batch = self._collate(self.train_reader, self.windows, examples, online)
        last = index + 1 == len(self.mine) or (index + 1) % self.accumulate == 0
        return replace(
            batch,
            normalizer=sum(self._learned(p) for p in together),
            index=index,
            place=index * self.world + self.rank,
            ends_step=last,
            epoch=together[-1].epoch,
        )

    def val_batch(self, examples: Sequence[int]) -> Batch:
        """A validation batch; its normaliser is of no use."""
        return self._collate(self.val_reader, self.val_windows, examples, self.online)

    def _collate(
        self, reader: Reader, windows: list[Window], examples: Sequence[int], online: bool
    ) -> Batch:
        chosen = [windows[i] for i in examples]
        B, T = len(examples), max(w.stop - w.start for w in chosen)
        tokens_BT = torch.zeros(B, T, dtype=torch.long)
        learn_BT = torch.zeros(B, T, dtype=torch.bool)
        context_BS = start_B = None
        if online:
            context_BS = torch.zeros(B, max(w.stop for w in chosen), dtype=torch.long)
            start_B = torch.tensor([w.start for w in chosen])
        parts: list[tuple[Features, Tensor]] = []
        signals: list[SignalRows] = []
        for row, (i, w) in enumerate(zip(examples, chosen, strict=True)):
            example = reader[i]
            tokens_BT[row, : w.stop - w.start] = example.tokens[w.start : w.stop]
            learn_BT[row, : w.stop - w.start] = example.learn[w.start : w.stop]
            if context_BS is not None:
                context_BS[row, : w.stop] = example.tokens[: w.stop]
                continue
            if self.signal is not None:
                signals.append(reader.signal(i, self.signal))
                continue
            stored = reader.features(i, self.layers)
            assert stored is not None, "the teacher reads from shards and there are none"
            parts.append((stored[0][:, w.start : w.stop], stored[1][w.start : w.stop]))
        # Without a window the first token of a sequence is never learned: nothing precedes it.
        learned = sum(w.learned for w in chosen)
        batch = Batch(tokens_BT, learn_BT, learned, learned)
        if context_BS is not None:
            return replace(batch, context_BS=context_BS, start_B=start_B)
        if signals:
            return replace(batch, signal=SignalRows.join(signals))
        final_BTd = _pad([f.final_BTd[0] for f, _ in parts], T)
        layers = {k: _pad([f.layers[k][0] for f, _ in parts], T) for k in self.layers}
        logz_BT = _pad([z for _, z in parts], T)
        return replace(batch, features=Features(final_BTd, layers), logz_BT=logz_BT)

    # --- Lightning -------------------------------------------------------------------------------

    def train_dataloader(self) -> PlannedLoader:
        return PlannedLoader(self)

    def val_dataloader(self) -> ValLoader:
        costs = [self._cost(w) for w in self.val_windows]
        budget = max(self.tokens_per_batch, *costs, 1)
        batches = plan_epoch(costs, budget, seed=0, epoch=0)
        return ValLoader(self, batches)

    def plan_hash(self) -> str:
        """16 hex digits of the plan: resuming needs the same one."""
        text = repr([p.examples for p in self.plan]) + repr(self.accumulate * self.world)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands. Saved after a batch was trained on, before the next."""
        assert self.trainer is not None
        taken = (self.trainer.fit_loop.total_batch_idx + 1) * self.world
        return {"taken": taken, "plan": self.plan_hash()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["plan"] != self.plan_hash():
            raise ValueError(
                "The checkpoint was made with other batches than this run would make, expected the "
                "same, because the dataset, the seed, data.tokens_per_batch, the micro-batches of "
                "a step or the length of the run changed; resume with what the run began with, or "
                "start a new run."
            )
        self.start = state_dict["taken"] // self.world


def _pad(rows: list[Tensor], length: int) -> Tensor:
    """Stack sequences of different length, zeros behind them."""
    padded = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _divisible(plan: list[Planned], group: int, world: int) -> list[Planned]:
    """Halve large batches until every step has `group`: nothing is repeated or dropped.

    Where all have one example the last step may be shorter, as long as the ranks have as many.
    """
    plan = list(plan)
    while len(plan) % group:
        i = max(range(len(plan)), key=lambda j: (len(plan[j].examples), j))
        whole = plan[i]
        if len(whole.examples) < 2:
            if len(plan) % world == 0:
                break
            raise ValueError(
                f"{len(plan)} batches of one example each cannot be shared by {world} processes, "
                "expected a multiple; use fewer processes or more data."
            )
        half = len(whole.examples) // 2
        plan[i : i + 1] = [
            replace(whole, examples=whole.examples[:half]),
            replace(whole, examples=whole.examples[half:]),
        ]
    return plan
