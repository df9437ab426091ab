"""The shadow: a copy of the drafter that learns while the original serves, and takes over or not.

A *job* is one update: a few optimizer steps of the shadow on what was served before the job began.
It may run in a thread beside the decoder; it is judged at the next boundary of the stream, on the
prompts served meanwhile. What a job does depends on (seed, number of the job, what was served)
alone and its end is waited for, so the thread changes the time and nothing else.

    gain - z * error >= 0    (and gain > 0) the shadow takes over: not worse, for all that these
                             prompts can tell
    gain + z * error < 0     it is worse (or not a number): back to the serving weights, a fresh
                             optimizer, half the learning rate
    otherwise                undecided: the shadow learns on and is judged again

The weights are fp32; serving and judging use them rounded to the target's dtype.

Shape legend: B sequences, M chosen (sequence, u, k) triples, A accepted drafts.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.drafter.base import Drafter
from train.chunked import chunked_loss, make_lesson, rows_per_chunk
from train.losses import RowLoss
from train.module import parameter_groups
from train.online.acceptance import Comparison, Serving, chain_accepted, chances, compare
from train.online.served import Served, Texts, only
from train.teacher import Teacher


class Updates:
    """How the drafter is updated.

    Each of the `steps` optimizer steps sees `prompts` texts, a share `replay` of them older ones
    out of a ring of `ring`, the others new since the last job. Its rows are the refused drafts of
    these texts, and so many accepted ones that they make up a share `replay` of all rows: learning
    from errors alone forgets what was right. The loss is the mean over the rows.
    """

    def __init__(
        self,
        *,
        steps: int = 8,
        prompts: int = 4,
        replay: float = 0.5,
        ring: int = 64,
        clip: float | None = 1.0,
        depth_decay: float = 1.0,
    ) -> None:
        if steps < 1 or prompts < 1 or ring < 1:
            raise ValueError(
                f"updates.steps={steps}, updates.prompts={prompts} and updates.ring={ring} must be "
                "at least 1 each: they count optimizer steps, texts of a step and texts kept."
            )
        if not 0.0 <= replay < 1.0:
            raise ValueError(
                f"updates.replay={replay} must lie between 0 and 1 (1 excluded): it is the share "
                "of accepted drafts among the rows and of older texts, and errors have to be left."
            )
        self.steps = steps
        self.prompts = prompts
        self.replay = replay
        self.ring = ring
        self.clip = clip
        self.depth_decay = depth_decay


@dataclass(frozen=True)
class Learned:
    """What a job did. Losses are the means over rows of its first and its last step."""

    steps: int
    rows: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Decision:
    """What became of the shadow after a job."""

    what: Literal["swapped", "kept", "reset"]
    compared: Comparison
    lr: float

    def as_dict(self) -> dict[str, Any]:
        return {"decision": self.what, **asdict(self.compared), "lr": self.lr}


class Learner:
    """Holds the serving drafter and its shadow, learns and decides."""

    def __init__(
        self,
        *,
        serving: Drafter,
        shadow: Drafter,
        candidate: Drafter,
        teacher: Teacher,
        loss: RowLoss,
        make_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        updates: Updates,
        z: float,
        seed: int,
    ) -> None:
        """`serving` and `candidate` have the dtype that is served, `shadow` is fp32."""
        self.serving = serving.eval().requires_grad_(False)
        self.candidate = candidate.eval().requires_grad_(False)
        self.shadow = shadow
        self.loss = loss
        self.updates = updates
        self.z = z
        self.seed = seed
        self._teacher = teacher
        self._make_optimizer = make_optimizer
        self._chunk_rows = rows_per_chunk(shadow.draft_vocab_size or shadow.vocab_size)
        teacher.set_vocab(shadow.draft_ids_D)
        self.weights = copy.deepcopy(shadow.state_dict())
        """fp32 weights of what is served."""
        self.optimizer = make_optimizer(parameter_groups(shadow))
        self.lr = float(self.optimizer.param_groups[0]["lr"])

    # --- learning ---------------------------------------------------------------------------------

    def learn(self, job: int, new: Sequence[Served], older: Sequence[Served]) -> Learned:
        """One job. It touches the shadow and its optimizer and nothing else."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + job)
        device = self.shadow.target.device
        losses, rows = [], 0
        # Dropout draws from torch's global generator, which serving does not use.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + job)
            self.shadow.train()
            for _ in range(self.updates.steps):
                texts = self._pick_texts(new, older, draw)
                chosen_M3 = self._pick_rows(texts, draw)
                if len(chosen_M3):
                    losses.append(self._step(texts, chosen_M3))
                    rows += len(chosen_M3)
            self.shadow.eval()
        first, last = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
        return Learned(len(losses), rows, first, last)

    def _pick_texts(
        self, new: Sequence[Served], older: Sequence[Served], draw: torch.Generator
    ) -> list[Served]:
        """Different texts; where one kind has too few, the other fills up."""
        count = min(self.updates.prompts, len(new) + len(older))
        wanted = min(len(older), round(count * self.updates.replay))
        wanted = max(wanted, count - len(new))
        found = []
        for pool, size in ((new, count - wanted), (older, wanted)):
            order = torch.randperm(len(pool), generator=draw)[:size]
            found += [pool[i] for i in order.tolist()]
        return found

    def _pick_rows(self, texts: Sequence[Served], draw: torch.Generator) -> Tensor:
        """All refused drafts of these texts and a share of the accepted ones, as (text, u, k)."""
        error_M3 = _numbered([t.error_E2 for t in texts])
        accepted_A3 = _numbered([t.accepted_A2 for t in texts])
        share = self.updates.replay
        count = round(len(error_M3) * share / (1.0 - share))
        order_A = torch.randperm(len(accepted_A3), generator=draw)[:count]
        return torch.cat([error_M3, accepted_A3[order_A]])

    def _step(self, texts: Sequence[Served], chosen_M3: Tensor) -> float:
        """One optimizer step; returns the loss."""
        shadow = self.shadow
        batch = Texts.of(texts, shadow.target.device, shadow.dtype)
        B, T = batch.tokens_BT.shape
        learn_BT = torch.zeros(B, T, dtype=torch.bool)
        # Teacher position u is picked by a lesson where the token after it is one to learn.
        learn_BT[chosen_M3[:, 0], chosen_M3[:, 1] + 1] = True
        lesson = make_lesson(
            tokens_BT=batch.tokens_BT,
            learn_BT=learn_BT.to(batch.tokens_BT.device),
            final_BTd=batch.features.final_BTd,
            logz_BT=None,
            draft_ids_D=shadow.draft_ids_D,
            vocab_size=shadow.vocab_size,
        )
        depths = only(list(shadow.unroll(batch.features, batch.tokens_BT)), chosen_M3, (B, T))
        sums = chunked_loss(
            depths=depths,
            lesson=lesson,
            loss=self.loss,
            projection=self._teacher,
            depth_decay=self.updates.depth_decay,
            chunk_rows=self._chunk_rows,
        )
        loss = sums.total / len(chosen_M3)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.updates.clip is not None:
            nn.utils.clip_grad_norm_(shadow.parameters(), self.updates.clip)
        self.optimizer.step()
        return float(loss.detach())

    # --- deciding ---------------------------------------------------------------------------------

    def judge(self, window: Sequence[Served], how: Serving) -> Decision:
        """Compare the shadow with what is served, on prompts the shadow has not seen, and act."""
        self.candidate.load_state_dict(self.shadow.state_dict())
        before, after = (
            [chain_accepted(chances(drafter, served, how)) for served in window]
            for drafter in (self.serving, self.candidate)
        )
        compared = compare(before, after, [served.answer - 1 for served in window])
        finite = math.isfinite(compared.gain) and all(
            bool(p.isfinite().all()) for p in self.shadow.parameters()
        )
        # One prompt alone has no standard error: nothing is certain then, either way.
        error = compared.error if math.isfinite(compared.error) else math.inf
        if not finite or compared.gain + self.z * error < 0.0:
            self._reset()
            return Decision("reset", compared, self.lr)
        if compared.gain > 0.0 and compared.gain - self.z * error >= 0.0:
            self.weights = copy.deepcopy(self.shadow.state_dict())
            self.serving.load_state_dict(self.weights)
            return Decision("swapped", compared, self.lr)
        return Decision("kept", compared, self.lr)

    def _reset(self) -> None:
        """The shadow starts again from what is served, more carefully."""
        self.shadow.load_state_dict(self.weights)
        self.optimizer = self._make_optimizer(parameter_groups(self.shadow))
        self.lr /= 2.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def served_drafter(self) -> Drafter:
        """The drafter that is served, in fp32. The shadow's own progress ends here."""
        self.shadow.load_state_dict(self.weights)
        return self.shadow

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "shadow": self.shadow.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr": self.lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]
        self.serving.load_state_dict(self.weights)
        self.shadow.load_state_dict(state["shadow"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr = state["lr"]


def _numbered(parts: Sequence[Tensor]) -> Tensor:
    """(u, k) rows of several texts as (text, u, k)."""
    return torch.cat([nn.functional.pad(part, (1, 0), value=b) for b, part in enumerate(parts)])
