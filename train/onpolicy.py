"""On-policy batches: the drafter learns on text it wrote itself.

A drafter that learns from the target's answers alone meets its own mistakes first when it drafts.
DistillSpec (arXiv 2310.08461) and GKD (2306.13649) let it continue prompts while it trains, and
teach it the target's distribution there; speculative KD (2410.11325) lets the target replace what
it would hardly say itself (see train/interleaved.py). No gradient passes through sampling.

For a share of the micro-batches the planned examples are replaced: prompt (all tokens before the
first one to learn) + what the drafter says after it, learned from the first sampled token to the
last, an end-of-answer token included. The target then reads these sequences once.

All randomness is a function of (seed, rank, micro-batch), and the replay ring is in the checkpoint.

Shape legend: B sequences, T positions.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from data_prep.conversation import stable_hash
from data_prep.generate import Request
from models.drafter.base import Drafter
from models.target import Target
from train.data import Batch, TrainData
from train.ring import Ring, Sampled, prompt_of
from train.teacher import Teacher
from train.writer import Mode, Writer


class Replay(TypedDict):
    """`size` sampled sequences are kept; `share` of the on-policy micro-batches are taken there."""

    size: int
    share: float


@dataclass
class Counts:
    """Tokens to learn and seconds of this process's on-policy batches.

    `judged` and `kept` are tokens of interleaved sampling: how many the target looked at, how many
    of them were the drafter's.
    """

    sampled: int = 0
    replayed: int = 0
    sequences: int = 0
    judged: int = 0
    kept: int = 0
    sampling_seconds: float = 0.0
    teaching_seconds: float = 0.0

    def add(self, other: "Counts") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class OnPolicy:
    """Replaces the examples of some micro-batches by the drafter's own text.

    `fraction` of the micro-batches, chosen by a hash of (seed, micro-batch) and so at the same time
    on every rank: 0 is off, 1 is fully on-policy, between them a mixture with the planned examples
    (GKD's lambda). `mode` draft samples from the drafter alone, interleaved lets the target replace
    tokens outside its `top_k` most likely. A sequence ends at the end-of-answer token, after
    `max_new_tokens`, or where the padded micro-batch would exceed data.tokens_per_batch.
    `batch_tokens` bounds rows x length of what is sampled together.
    """

    def __init__(
        self,
        *,
        target: Target,
        seed: int,
        fraction: float = 0.5,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        mode: Mode = "draft",
        top_k: int = 25,
        batch_tokens: int = 32_768,
        replay: Replay | None = None,
    ) -> None:
        for name, value in (("fraction", fraction), ("replay.share", (replay or {}).get("share"))):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"onpolicy.{name}={value} should lie between 0 and 1, because it is the share "
                    "of micro-batches; give e.g. 0.5."
                )
        sizes = {"max_new_tokens": max_new_tokens, "top_k": top_k, "batch_tokens": batch_tokens}
        if replay is not None:
            sizes["replay.size"] = replay["size"]
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(
                    f"onpolicy.{name}={value} should be 1 or more, because nothing could be "
                    "sampled otherwise; give a positive number."
                )
        if temperature < 0.0 or not 0.0 < top_p <= 1.0:
            raise ValueError(
                f"onpolicy.temperature={temperature} and top_p={top_p} should be at least 0 and in "
                "(0, 1], because they shape the distribution that is sampled from; give e.g. "
                "temperature=1.0 and top_p=1.0 (temperature 0 is greedy)."
            )
        self.target, self.seed, self.fraction = target, seed, fraction
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.writer = Writer(target=target, mode=mode, top_k=top_k, batch_tokens=batch_tokens)
        self.share = 0.0 if replay is None else replay["share"]
        self.ring = None if replay is None else Ring(replay["size"])
        self.totals = Counts()
        self._step = Counts()
        self._ready: dict[int, list[Sampled]] = {}
        self._first: int | None = None
        self._normalizer: int | None = None

    def describe(self) -> str:
        """One line for the banner."""
        who = "the drafter"
        if self.writer.mode == "interleaved":
            who += f", corrected by the target outside its {self.writer.top_k} best tokens"
        again = f", {self.share:.0%} of these replayed" if self.ring is not None else ""
        return (
            f"about {self.fraction:.0%} of the micro-batches{again}, written by {who}: up to "
            f"{self.max_new_tokens} tokens, temperature {self.temperature:g}, top_p {self.top_p:g}"
        )

    def chosen(self, index: int) -> bool:
        """Whether micro-batch number `index` is on-policy."""
        return _uniform(f"onpolicy {self.seed} {index}") < self.fraction

    def batch(
        self,
        batch: Batch,
        *,
        data: TrainData,
        drafter: Drafter,
        teacher: Teacher | None,
        total: Callable[[int], int],
    ) -> Batch:
        """The micro-batch to train on instead of `batch`, which is the planned one.

        All on-policy micro-batches of an optimizer step are sampled when its first one begins: the
        drafter's weights are the same for all of them, and the step's normaliser is known then.
        `teacher` None leaves out the target's features. `total` sums a number over ranks.
        """
        first = batch.index - batch.index % data.accumulate
        if first != self._first:
            self._begin_step(first, data=data, drafter=drafter, total=total)
        if self._normalizer is None:
            return batch
        if batch.index not in self._ready:
            return replace(batch, normalizer=self._normalizer)
        made = collate(self._ready.pop(batch.index), batch, self._normalizer)
        made = made.to(batch.tokens_BT.device)
        if teacher is None:
            return made
        with self._timed("teaching_seconds"):
            features, logz_BT = teacher.features(made, drafter.feature_layers)
        return replace(made, features=features, logz_BT=logz_BT, context_BS=None, start_B=None)

    def take_counts(self) -> dict[str, float]:
        """Numbers of the optimizer step that ends here, for the log."""
        step, self._step = self._step, Counts()
        self.totals.add(step)
        numbers = {
            "train/sampled_tokens": step.sampled,
            "train/replayed_tokens": step.replayed,
            "train/sampled_length": (step.sampled + step.replayed) / max(1, step.sequences),
            "train/sampling_seconds": step.sampling_seconds,
            "train/teaching_seconds": step.teaching_seconds,
        }
        if self.writer.mode == "interleaved":
            numbers["train/kept"] = step.kept / max(1, step.judged)
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the replay ring, and the counts so far."""
        return {
            "counts": dict(vars(self.totals)),
            "ring": None if self.ring is None else self.ring.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.totals = Counts(**state["counts"])
        if self.ring is not None:
            self.ring.load_state_dict(state["ring"])

    # --- one optimizer step ----------------------------------------------------------------------

    def _begin_step(
        self, first: int, *, data: TrainData, drafter: Drafter, total: Callable[[int], int]
    ) -> None:
        assert not self._ready, "a sampled micro-batch was not trained on"
        self._first, self._normalizer = first, None
        own = range(first, min(first + data.accumulate, len(data.mine)))
        chosen = [i for i in own if self.chosen(i)]
        if not chosen:
            return  # on every rank alike: the choice does not depend on the rank
        wanted: list[Request] = []
        for i in chosen:
            old = self._replayed(i, data)
            if old is None:
                wanted += self._requests(i, data)
            else:
                self._ready[i] = old
                self._step.replayed += sum(s.learned for s in old)
        with self._timed("sampling_seconds"):
            fresh = self.writer.write(wanted, drafter)
        for request in wanted:
            i = int(request.id.split("/")[0])
            self._ready.setdefault(i, []).append(fresh[request.id])
        if self.ring is not None:
            self.ring.add([fresh[request.id] for request in wanted])
        self._step.sampled += sum(s.learned for s in fresh.values())
        judged, kept = self.writer.take_counts()
        self._step.judged += judged
        self._step.kept += kept
        self._step.sequences += sum(len(rows) for rows in self._ready.values())
        as_planned = [e for i in own if i not in self._ready for e in data.mine[i].examples]
        planned = sum(data.windows[e].learned for e in as_planned)
        ready = sum(s.learned for rows in self._ready.values() for s in rows)
        self._normalizer = total(planned + ready)

    def _replayed(self, index: int, data: TrainData) -> list[Sampled] | None:
        """Sequences of the ring for this micro-batch; None when it has to be sampled."""
        rows = len(data.mine[index].examples)
        if self.ring is None or len(self.ring.items) < min(rows, self.ring.size):
            return None
        if _uniform(f"replay {self.seed} {index}") >= self.share:
            return None
        rng = np.random.default_rng([self.seed, data.rank, index])
        return self.ring.pick(rows, data.tokens_per_batch, rng)

    def _requests(self, index: int, data: TrainData) -> list[Request]:
        """The prompts of a planned micro-batch, with what may be written behind each."""
        examples = data.mine[index].examples
        # A planned batch fits into the budget, so each row has room for its planned length.
        longest = data.tokens_per_batch // len(examples)
        requests = []
        for row, i in enumerate(examples):
            example = data.train_reader[i]
            prompt = prompt_of(example.tokens, example.learn)
            name = f"sample {self.seed} {data.rank} {index} {row}"
            requests.append(
                Request(
                    id=f"{index}/{row}",
                    tokens=prompt,
                    max_new_tokens=min(self.max_new_tokens, longest - len(prompt)),
                    temperature=self.temperature,
                    top_p=self.top_p,
                    seed=stable_hash(name) % 2**31,
                )
            )
        return requests

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        setattr(self._step, name, getattr(self._step, name) + self._now() - begin)

    def _now(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()


def collate(rows: Sequence[Sampled], planned: Batch, normalizer: int) -> Batch:
    """Right-padded sequences at the place of a planned micro-batch; exactly the samples learn."""
    B, T = len(rows), max(len(s.tokens) for s in rows)
    tokens_BT = torch.zeros(B, T, dtype=torch.long)
    learn_BT = torch.zeros(B, T, dtype=torch.bool)
    for row, sampled in enumerate(rows):
        tokens_BT[row, : len(sampled.tokens)] = sampled.tokens
        learn_BT[row, sampled.prompt : len(sampled.tokens)] = True
    return Batch(
        tokens_BT,
        learn_BT,
        normalizer=normalizer,
        learned=int(learn_BT.sum()),
        index=planned.index,
        place=planned.place,
        ends_step=planned.ends_step,
        epoch=planned.epoch,
        context_BS=tokens_BT,
        start_B=torch.zeros(B, dtype=torch.long),
    )


def dealt(states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """The state of one rank out of those of a run that may have had another number of them.

    Rings go round in turn, so that every rank has sequences to replay; counts stay with rank 0.
    """
    if len(states) == world:
        return states[rank]
    rings = [state["ring"] for state in states]
    counts = [state["counts"] for state in states]
    summed = {name: sum(c[name] for c in counts) for name in counts[0]}
    nothing = dict.fromkeys(summed, 0)
    ring = rings[rank % len(rings)]
    return {"counts": summed if rank == 0 else nothing, "ring": ring}


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return stable_hash(text) / 2**64
