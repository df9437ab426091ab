"""Training an acceptance head for a drafter that is there already (SpecDec++, arXiv 2405.19715).

At every position of the target's own samples the drafter draws a candidate y ~ q behind the true
text, and the head learns the chance that it is accepted:

    a = min(1, p(y) / q(y))            label: ratio
    a = sum_v min(p(v), q(v))          label: overlap, 1 - TV(p, q): the same for every candidate
    loss = sum [w (1 - a)(-log(1 - P)) + a (-log P)] / sum [w (1 - a) + a]

p and q are taken at the serving temperature; greedy (0), a is 1 where both have the same best
token. That the text before is the target's is what the head is asked about while drafting: the
chance of a draft, given that the drafts before it were accepted.

With reads=candidate the drafter runs a second time over Z: Z_i is the candidate of its position, or
(with probability `mixing`, its loss left out) the true token; the head reads the state at Z_i. So
it meets states behind candidates, which is where it is asked, and not behind true text alone.

Shape legend: B sequences, T positions, U teacher positions, N rows, n chunk rows, d width of
states, V target vocabulary, D draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from conf.console import say
from data_prep.prompts import Prompt
from data_prep.shards import Example, ShardReader
from data_prep.signal import SignalRows
from decode.answers import Recorded
from decode.calibration import calibrate, reliability_plot
from decode.progress import progress_bar
from decode.trace import trace
from models.acceptance import AcceptanceHead, numbers_of
from models.drafter.base import Depth, Drafter
from models.run import open_run
from models.sampling import draw
from models.target import Features, Target
from train.chunked import chunked_loss
from train.data import Batch, TrainData
from train.lesson import Lesson, make_lesson, rows_of
from train.module import DraftModule
from train.record import write_json
from train.strategy.whole import Whole

ROWS = 256
"""Rows whose logits over the whole vocabulary are alive at once."""


@dataclass(frozen=True)
class Acceptance:
    """What the head is and how it is trained (conf/acceptance).

    `reads` auto is candidate for a drafter that reads tokens one by one, else drawn. With `frozen`
    the drafter stays as it is; otherwise its own loss is descended together with `weight` times the
    head's. `depths` are calibrated one by one, on drafts made at every `stride`-th position of
    `answers` held-out answers. The answers are those of the run's own dataset or, with data=given,
    of the one that is named beside it: best of prompts that the drafter never learned from, since
    it is better on those it knows, and its head would expect that of others too.
    """

    temperature: float
    data: Literal["start", "given"] = "start"
    reads: Literal["auto", "candidate", "drawn"] = "auto"
    label: Literal["ratio", "overlap"] = "ratio"
    num_blocks: int = 3
    rejection_weight: float = 6.0
    mixing: float = 0.15
    frozen: bool = True
    weight: float = 1.0
    depths: int = 8
    stride: int = 2
    answers: int = 100

    def __post_init__(self) -> None:
        for name, given, good in (
            ("temperature", self.temperature, self.temperature >= 0.0),
            ("mixing", self.mixing, 0.0 <= self.mixing < 1.0),
            ("rejection_weight", self.rejection_weight, self.rejection_weight > 0.0),
            ("depths", self.depths, self.depths >= 1),
            ("stride", self.stride, self.stride >= 1),
            ("answers", self.answers, self.answers >= 2),
        ):
            if not good:
                raise ValueError(
                    f"acceptance.{name}={given:g} is out of its range (temperature 0 or more, "
                    "mixing from 0 to below 1, rejection_weight above 0, depths and stride 1 or "
                    "more, answers 2 or more), because nothing could be learned with it; give "
                    "another value."
                )

    def head(self, drafter: Drafter) -> AcceptanceHead:
        """A new head for this drafter."""
        embedded_1e = drafter.embed(torch.zeros(1, dtype=torch.long, device=drafter.target.device))
        return AcceptanceHead(
            state_size=drafter.state_size,
            embedding_size=embedded_1e.shape[-1],
            reads=self._reads(drafter),
            num_blocks=self.num_blocks,
            rejection_weight=self.rejection_weight,
            label=self.label,
            temperature=self.temperature,
        )

    def _reads(self, drafter: Drafter) -> Literal["candidate", "drawn"]:
        recurrent = drafter.max_depth is None and (
            not drafter.reads_features or bool(drafter.computed_layers)
        )
        if self.reads == "auto":
            found = "candidate" if recurrent else "drawn"
            what = "at the candidate" if recurrent else "a candidate is drawn from, and the token"
            say(f"Acceptance head: reads the drafter's state {what} (reads={found}).")
            return found
        if self.reads == "candidate" and not recurrent:
            raise ValueError(
                "acceptance.reads=candidate reads the state of a drafter behind its own drafted "
                f"token, but a {type(drafter).__name__} reads the target's features there; use "
                "acceptance.reads=drawn, which every drafter has."
            )
        return self.reads


class Chosen:
    """The examples of a reader that the target answered at one temperature."""

    def __init__(self, reader: ShardReader, temperature: float) -> None:
        self.reader, self.folder = reader, reader.folder
        self.layers, self.signals = reader.layers, reader.signals
        given = [reader[i].temperature for i in range(len(reader))]
        self.chosen = [
            i for i, t in enumerate(given) if t is not None and abs(t - temperature) < 1e-6
        ]
        if not self.chosen:
            found = sorted({t for t in given if t is not None})
            raise ValueError(
                f"acceptance.temperature={temperature:g} needs answers that the target gave at "
                f"that temperature, but those in '{reader.folder}' ({reader.split}) have "
                f"{found or 'none of their own'}; add {{temperature: {temperature:g}, top_p: 1.0}} "
                "to dataset.respond.samples under a new dataset.name, or train for a temperature "
                "that is there."
            )

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int, /) -> Example:
        return self.reader[self.chosen[index]]

    def features(self, index: int, layers: Sequence[int] = (), /) -> tuple[Features, Tensor] | None:
        return self.reader.features(self.chosen[index], layers)

    def signal(self, index: int, name: str, /) -> SignalRows:
        return self.reader.signal(self.chosen[index], name)


@dataclass(frozen=True)
class Judged:
    """The head's logits and their labels, over the rows of a batch; and the mean label of the first
    depth."""

    logits_N: Tensor
    label_N: Tensor
    first: Tensor

    def loss(self, w: float) -> Tensor:
        """The weighted cross-entropy above."""
        a_N = self.label_N
        total = w * (1.0 - a_N) * F.softplus(self.logits_N) + a_N * F.softplus(-self.logits_N)
        return total.sum() / (w * (1.0 - a_N) + a_N).sum().clamp(min=1e-9)


class AcceptanceModule(DraftModule):
    """Trains the head, beside a drafter that is frozen or learns as well."""

    judge: AcceptanceHead
    plan: Acceptance

    def attach(self, head: AcceptanceHead, plan: Acceptance) -> None:
        """The head to train. The drafter is saved with it from now on."""
        self.judge, self.plan = head, plan
        self.drafter.train()
        self.drafter.set_acceptance(head)
        if plan.frozen:
            self.drafter.requires_grad_(False)
        self._sums = [0.0, 0.0]
        count = sum(p.numel() for p in head.parameters())
        kept = "stays as it is" if plan.frozen else "learns as well"
        say(f"Acceptance head: {count / 1e6:.2f} M parameters; the drafter {kept}.")

    @property
    def learning(self) -> nn.Module:
        return nn.ModuleList([self.drafter, self.judge])

    def configure_model(self) -> None:
        super().configure_model()
        if self.plain.acceptance is not None and self.plain is not self.drafter:
            self.plain.acceptance.to("cpu")

    def whole_drafter(self) -> Drafter:
        drafter, strategy = super().whole_drafter(), self.trainer.strategy
        if isinstance(strategy, Whole):
            assert drafter.acceptance is not None
            drafter.acceptance.load_state_dict(strategy.whole_module(self.judge))
        return drafter

    def remade(self, drafter: Drafter) -> "AcceptanceModule":
        made = super().remade(drafter)
        assert isinstance(made, AcceptanceModule)
        assert drafter.acceptance is not None
        made.judge, made.plan, made._sums = drafter.acceptance, self.plan, self._sums
        return made

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            return self._step(batch)

    def _step(self, batch: Batch) -> Tensor:
        if self.plan.frozen:
            self.drafter.eval()
        with torch.set_grad_enabled(not self.plan.frozen):
            features, lesson, depths = self._unrolled(batch)
        judged = self._judged(batch, features, lesson, depths)
        loss = judged.loss(self.plan.rejection_weight)
        self._report_step(batch, torch.stack([loss.detach(), judged.first.detach()]))
        if self.plan.frozen:
            return loss
        own = chunked_loss(
            depths=depths[: self.drafter.num_depths],
            lesson=lesson,
            loss=self.loss,
            projection=self.teacher,
            depth_decay=self.depth_decay,
            chunk_rows=self.chunk_rows,
        )
        return own.total * (self._shares / batch.normalizer) + self.plan.weight * loss

    def _report_step(self, batch: Batch, numbers_2: Tensor) -> None:
        """Log means over the micro-batches and ranks of an optimizer step."""
        self._step_sums.append(numbers_2.float())
        if not batch.ends_step:
            return
        mean_2 = torch.stack(self._step_sums).mean(0)
        self._step_sums.clear()
        if self.trainer.world_size > 1:
            mean_2 = self.trainer.strategy.reduce(mean_2, reduce_op="mean")
        step = self.global_step + 1
        numbers = {
            "train/loss": float(mean_2[0]),
            "train/accuracy_0": float(mean_2[1]),
            "train/lr": float(self.optimizers().param_groups[0]["lr"]),  # type: ignore[union-attr]
            "epoch": batch.epoch,
        }
        self._log(numbers, step=step, log=step % self.trainer.log_every_n_steps == 0)  # type: ignore[attr-defined]

    def _unrolled(self, batch: Batch) -> tuple[Features, Lesson, list[Depth]]:
        features, logz_BT = self._features(batch)
        lesson = make_lesson(
            tokens_BT=batch.tokens_BT,
            learn_BT=batch.learn_BT,
            final_BTd=features.final_BTd,
            logz_BT=logz_BT,
            draft_ids_D=self.drafter.draft_ids_D,
            vocab_size=self.drafter.vocab_size,
        )
        count = self.drafter.measured_depths
        return features, lesson, list(self.drafter.unroll_to(features, batch.tokens_BT, count))

    def _judged(
        self, batch: Batch, features: Features, lesson: Lesson, depths: list[Depth]
    ) -> Judged:
        """Candidates at every row of every depth that drafts, judged."""
        served = depths[-1:] if depths[-1].shift == 0 else depths
        if self.judge.reads == "candidate":
            return self._judged_behind(batch, features, lesson, served[0])
        logits, labels = [], []
        for view in served:
            state_N, teacher_N = rows_of(view, lesson)
            states_Nd = view.states_BNd.flatten(0, 1)[state_N]
            drawn = draw_candidates(
                self.drafter, view, states_Nd, lesson.final_Ud[teacher_N], self.plan
            )
            embedded_Ne = self.drafter.embed(self.drafter.to_target_ids(drawn.draft_N))
            logits.append(self.judge.raw(states_Nd, embedded_Ne, drawn.numbers_N3))
            labels.append(drawn.label_N)
        return Judged(torch.cat(logits), torch.cat(labels), labels[0].mean())

    def _judged_behind(
        self, batch: Batch, features: Features, lesson: Lesson, view: Depth
    ) -> Judged:
        """The states behind the candidates, from a second pass over mixed tokens Z."""
        state_N, teacher_N = rows_of(view, lesson)
        with torch.no_grad():
            states_Nd = view.states_BNd.flatten(0, 1)[state_N]
            drawn = draw_candidates(
                self.drafter, view, states_Nd, lesson.final_Ud[teacher_N], self.plan
            )
        # The state at u predicts x_{u+1}: its candidate takes the place of that token.
        place_N = state_N + 1
        kept_N = torch.rand(len(place_N), device=place_N.device) >= self.plan.mixing
        mixed_M = batch.tokens_BT.flatten().clone()
        candidate_N = self.drafter.to_target_ids(drawn.draft_N)
        mixed_M[place_N[kept_N]] = candidate_N[kept_N]
        mixed_BT = mixed_M.view_as(batch.tokens_BT)
        layers = self.drafter.computed_layers
        if layers:
            # What the drafter computes of the tokens itself follows from Z.
            features = self._in_step_dtype(self._target_features(mixed_BT, layers))
        with torch.set_grad_enabled(not self.plan.frozen):
            behind = list(self.drafter.unroll(features, mixed_BT))[-1]
        judged_nd = behind.states_BNd.flatten(0, 1)[place_N[kept_N]]
        return Judged(self.judge.raw(judged_nd), drawn.label_N[kept_N], drawn.label_N.mean())

    def _target_features(self, tokens_BT: Tensor, layers: tuple[int, ...]) -> Features:
        with torch.autocast(self.device.type, enabled=False):
            return self.teacher.target.forward(tokens_BT, layers=layers)

    # --- validation ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._sums = [0.0, 0.0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch.repeated:
            return
        # The same candidates at every validation.
        context = self.trainer.precision_plugin.forward_context()
        with torch.random.fork_rng(devices=[]), context:
            torch.manual_seed(batch_idx * self.trainer.world_size + self.trainer.global_rank)
            judged = self._judged(batch, *self._unrolled(batch))
        shifted = Judged(
            judged.logits_N + torch.log(torch.tensor(self.plan.rejection_weight)),
            judged.label_N,
            judged.first,
        )
        self._sums[0] += float(shifted.loss(1.0)) * len(judged.label_N)
        self._sums[1] += len(judged.label_N)

    def own_numbers(self) -> dict[str, float]:
        """The unweighted cross-entropy with the weight undone: a proper score of the chances."""
        sums = torch.tensor(self._sums, dtype=torch.float64, device=self.device)
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return {"val/acceptance_score": -float(sums[0]) / max(1.0, float(sums[1]))}


@dataclass(frozen=True)
class Candidates:
    """A drawn token of each row (an index of the draft vocabulary), its label, and q's numbers."""

    draft_N: Tensor
    label_N: Tensor
    numbers_N3: Tensor


@torch.no_grad()
def draw_candidates(
    drafter: Drafter, view: Depth, states_Nd: Tensor, final_Nd: Tensor, plan: Acceptance
) -> Candidates:
    """y ~ q at the serving temperature, and the chance that p accepts it."""
    target: Target = drafter.target
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(states_Nd), ROWS):
        piece = slice(start, start + ROWS)
        logits_nD = view.head(states_Nd[piece]).float()
        with torch.autocast(final_Nd.device.type, enabled=False):
            logits_nV = target.project(final_Nd[piece].to(target.dtype)).float()
        logq_nD = logits_nD.log_softmax(-1)
        if plan.temperature == 0.0:
            draft_n = logits_nD.argmax(-1)
            label_n = (drafter.to_target_ids(draft_n) == logits_nV.argmax(-1)).float()
        else:
            q_nD = (logits_nD / plan.temperature).softmax(-1)
            p_nV = (logits_nV / plan.temperature).softmax(-1)
            ids = slice(None) if drafter.draft_ids_D is None else drafter.draft_ids_D
            p_nD = p_nV[:, ids]
            draft_n = draw(q_nD, torch.rand(len(q_nD), device=q_nD.device))
            if plan.label == "overlap":
                label_n = torch.minimum(p_nD, q_nD).sum(-1)
            else:
                ratio_n1 = (p_nD / q_nD).gather(-1, draft_n[:, None])
                label_n = ratio_n1[:, 0].clamp(max=1.0)
        found.append((draft_n, label_n, numbers_of(logq_nD, draft_n)))
    draft, label, numbers = zip(*found, strict=True)
    return Candidates(torch.cat(draft), torch.cat(label), torch.cat(numbers))


def borrow(cfg: DictConfig) -> DictConfig:
    """The config of a run that trains an acceptance head, with the target, the drafter and (unless
    acceptance.data=given) the dataset of the run that `start` names. Any other config as it is."""
    if cfg.get("acceptance") is None:
        return cfg
    if cfg.start is None:
        raise ValueError(
            "An acceptance head is trained for a drafter that is there already, but none was "
            "named; give its run, for example start=runs/small_lm/latest."
        )
    if any(cfg.get(name) is not None for name in ("mix", "onpolicy", "weighting")):
        raise ValueError(
            "An acceptance head learns from the target's answers as they are, but mix, onpolicy or "
            "weighting was given; set all three to null."
        )
    named = Path(cfg.start)
    run = open_run(named.parent if named.name == "drafter" else named)
    borrowed = cfg.copy()
    OmegaConf.set_readonly(borrowed, False)
    own = ("dataset",) if cfg.acceptance.get("data", "start") == "start" else ()
    if own:
        say(
            f"Acceptance head: learns from '{run.config.dataset.name}', the dataset of its "
            "drafter's run; acceptance.data=given takes the one of dataset=<name> instead."
        )
    for name in ("target", "drafter", *own):
        borrowed[name] = run.config[name]
    borrowed.start = str(run.path)
    return borrowed


def settle(module: AcceptanceModule, data: TrainData, run_dir: Path) -> None:
    """Calibrate the trained head on held-out answers, and write what came of it."""
    drafter, plan = module.drafter, module.plan
    target = module.teacher.target
    count = min(len(data.val_reader), plan.answers)
    answers = [recorded(data.val_reader[i]) for i in range(count)]
    kept = drafter.dtype
    drafter.to(target.dtype).eval()  # as it will be served
    with progress_bar("calibrating on held-out answers", count) as on_answer:
        made = trace(
            target,
            drafter,
            answers,
            gamma=min(plan.depths, drafter.max_depth or plan.depths) + module.judge.lag,
            temperature=plan.temperature,
            max_new_tokens=max(len(a.tokens) for a in answers),
            stride=plan.stride,
            on_answer=on_answer,
        )
    found = calibrate(module.judge.eval(), made)
    drafter.to(kept)
    say(found.sentence())
    write_json(run_dir / "reliability.json", found.as_dict())
    how = "greedy" if plan.temperature == 0.0 else f"T={plan.temperature:g}"
    caption = f"{found.prompts_measured} held-out prompts, {found.drafts:,} drafts, {how}"
    reliability_plot(found, run_dir / "reliability.png", caption=caption)


def recorded(example: Example) -> Recorded:
    """A held-out example as an answer: what stands before the first token to learn is asked."""
    start = int(example.learn.nonzero()[0, 0])
    tokens = example.tokens.tolist()
    return Recorded(Prompt(example.id, tokens[:start], example.category or ""), tokens[start:], [])
