"""The one LightningModule: any drafter, any row loss, any teacher."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models.drafter.base import Depth, Drafter
from models.head import Head
from models.target import Features
from train.chunked import Lesson, LossSums, chunked_loss, make_lesson, rows_per_chunk
from train.data import Batch, TrainData
from train.losses import RowLoss
from train.metrics import Tally, tally_batch
from train.onpolicy import OnPolicy, dealt
from train.progress import count_again
from train.recompute import recompute_activations
from train.strategy.fsdp2 import FSDP2
from train.strategy.target import shard_target
from train.strategy.whole import Whole, whole_context
from train.teacher import Teacher
from train.weighting import Situation, Weighting
from train.writer import check_drafter


class DraftModule(LightningModule):
    """Unrolls a drafter on the teacher's features and descends sum_k lambda^k loss_k.

    The loss is divided by the number of tokens to learn in the whole optimizer step (all
    micro-batches, all ranks), so that accumulation and the number of processes change nothing.
    The target is not a sub-module: it is in no checkpoint and no optimizer.
    """

    def __init__(
        self,
        *,
        drafter: Drafter,
        teacher: Teacher,
        loss: RowLoss,
        make_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        make_scheduler: Callable[[Optimizer], LRScheduler],
        depth_decay: float = 1.0,
        mask_lag: int = 0,
        chunk_rows: int | None = None,
        seed: int = 0,
        onpolicy: OnPolicy | None = None,
        weighting: Weighting | None = None,
        recompute: bool = False,
        shards_target: bool = False,
    ) -> None:
        super().__init__()
        self._made = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.drafter = drafter
        self.teacher = teacher
        self.loss = loss
        self.depth_decay = depth_decay
        self.mask_lag = mask_lag
        _check_mask_lag(mask_lag, teacher)
        self.chunk_rows = chunk_rows or rows_per_chunk(
            drafter.draft_vocab_size or drafter.vocab_size,
            drafter.num_depths,
            teacher.target.device.type,
        )
        self.seed = seed
        self.onpolicy = onpolicy
        self.weighting = weighting
        if weighting is not None:
            weighting.check(drafter)
        if onpolicy is not None:
            check_drafter(drafter)
        self._make_optimizer, self._make_scheduler = make_optimizer, make_scheduler
        self.tally = self._empty_tally(torch.device("cpu"))
        self.validated_step: int | None = None
        self._step_sums: list[Tensor] = []
        self._plain: list[Drafter] = []  # in a list: no sub-module
        self._trained: list[Drafter] = []
        self._groups: list[list[nn.Parameter]] = []
        teacher.set_vocab(drafter.draft_ids_D)
        self._recompute, self._shard_target = recompute, shards_target

    def remade(self, drafter: Drafter) -> "DraftModule":
        """The same around a drafter that is trained."""
        made = type(self)(
            **self._made | {"drafter": drafter, "recompute": False, "shards_target": False}
        )
        made.end_with(drafter)
        made.tally, made.validated_step = self.tally, self.validated_step
        return made

    # --- several processes -----------------------------------------------------------------------

    def configure_model(self) -> None:
        """Before the optimizer is made: a sharding strategy takes the drafter apart."""
        strategy = self.trainer.strategy
        if self._shard_target:
            target, local = self.teacher.target, self.trainer.num_devices
            shard_target(target, device=strategy.root_device, local=local)
            # What was read from it before lies where it was.
            self.teacher.set_vocab(self.drafter.draft_ids_D)
            self.drafter.bind(target)
            self._shard_target = False
        if isinstance(strategy, Whole) and not self._plain:
            target = self.teacher.target
            shared = {id(part): part for part in (target, target.model, *target.model.modules())}
            shared |= {id(part): part for part in target.model.parameters()}
            self._plain.append(copy.deepcopy(self.drafter, shared).to("cpu"))
        if self._recompute:
            recompute_activations(self.drafter)
            self._recompute = False
        if isinstance(strategy, FSDP2):
            strategy.shard(self)

    def whole_drafter(self) -> Drafter:
        """The drafter with all its weights. Every process must come here."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, Whole):
            return self.drafter
        (plain,) = self._plain
        plain.load_state_dict(strategy.whole_module(self.drafter))
        return plain

    @property
    def plain(self) -> Drafter:
        """The drafter that no strategy has taken apart. Its weights are those of the last call of
        `whole_drafter`."""
        return self._plain[0] if self._plain else self.drafter

    def trained_groups(self) -> list[list[nn.Parameter]]:
        """The trained parameters, as they were grouped for the optimizer."""
        return self._groups

    def on_train_end(self) -> None:
        self.end_with(self.whole_drafter())

    @property
    def trained(self) -> Drafter | None:
        """The whole drafter, once its last step is done."""
        return self._trained[0] if self._trained else None

    def end_with(self, drafter: Drafter) -> None:
        """This is it."""
        self._trained = [drafter]

    # --- one batch -------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> tuple[list[Depth], Lesson]:
        """Drafter states at every depth, and what they are taught."""
        features, logz_BT = self._features(batch)
        lesson = make_lesson(
            tokens_BT=batch.tokens_BT,
            learn_BT=batch.learn_BT,
            final_BTd=features.final_BTd,
            logz_BT=logz_BT,
            draft_ids_D=self.drafter.draft_ids_D,
            vocab_size=self.drafter.vocab_size,
            mask_lag=self.mask_lag if self.training else 0,
        )
        if batch.signal is not None:
            lesson = replace(lesson, target=self.teacher.stored(batch.signal))
        count = self.drafter.num_depths if self.training else self.drafter.measured_depths
        depths = list(
            self.drafter.unroll_taught(features, batch.tokens_BT, count, lesson.taught_BT)
        )
        if self.training and self.weighting is not None:
            depths = self.weighting(
                Situation(depths, lesson, self.teacher, self.chunk_rows, features, batch.tokens_BT)
            )
        return depths, lesson

    def _features(self, batch: Batch) -> tuple[Features, Tensor | None]:
        """What the target computed; nothing at all (width 0) where nobody asks for it: a drafter
        that reads tokens only, learning from tokens only (pretraining on text) or from a signal."""
        asked = self.drafter.reads_features or self.loss.needs_target or self.loss.needs_features
        asked = asked or (self.weighting is not None and self.weighting.needs_target)
        if batch.signal is not None or (self.training and not asked):
            return Features(torch.empty(*batch.tokens_BT.shape, 0, device=self.device)), None
        features, logz_BT = self.teacher.features(batch, self.drafter.feature_layers)
        return self._in_step_dtype(features), logz_BT

    def _in_step_dtype(self, features: Features) -> Features:
        """fp32 training reads fp32 features; autocast casts what it multiplies by itself."""
        device = self.device.type
        return features if torch.is_autocast_enabled(device) else features.to(self.drafter.dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            depths, lesson = self.prepare(batch)
            sums = chunked_loss(
                depths=depths,
                lesson=lesson,
                loss=self.loss,
                projection=self.teacher,
                depth_decay=self.depth_decay,
                chunk_rows=self.chunk_rows,
            )
        self._report(sums, batch)
        # Lightning divides by the micro-batches of a step and averages over ranks; the normaliser
        # already covers both.
        return sums.total * (self._shares / batch.normalizer)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """On-policy micro-batches become what the drafter writes.

        Here, and not in the step: everything behind this hook meets the batch that is trained on,
        and autocast in the step would keep weights it has cast without gradients.
        """
        if self.onpolicy is None or not self.trainer.training:
            return batch
        with (
            self.trainer.precision_plugin.forward_context(),
            whole_context(self),
        ):
            self._forget()
            return self.onpolicy.batch(
                batch,
                data=self.trainer.datamodule,  # type: ignore[attr-defined]
                drafter=self.drafter,
                teacher=self.teacher if self.loss.needs_target else None,
                total=self._sum_over_ranks,
            )

    def _sum_over_ranks(self, number: int) -> int:
        if self.trainer.world_size == 1:
            return number
        counted = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        return int(self.trainer.strategy.reduce(counted, reduce_op="sum"))  # type: ignore[arg-type]

    @property
    def _shares(self) -> int:
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout depends on the seed and the micro-batch's place in the plan alone: a resumed run
        draws the same, and so does one on another number of processes."""
        assert batch.index == self.trainer.fit_loop.total_batch_idx, "the sampler lost its place"
        mixed = np.random.SeedSequence([self.seed, 0, batch.place])
        torch.manual_seed(int(mixed.generate_state(1)[0]))

    def _report(self, sums: LossSums, batch: Batch) -> None:
        """Log per optimizer step, over all its micro-batches and ranks."""
        device = sums.loss_K.device
        self._step_sums.append(torch.stack([sums.loss_K, sums.right_K, sums.count_K.to(device)]))
        if not batch.ends_step:
            return
        total_3K = torch.stack(self._step_sums).sum(0)
        self._step_sums.clear()
        if self.trainer.world_size > 1:
            total_3K = self.trainer.strategy.reduce(total_3K, reduce_op="sum")
        loss_K, right_K, count_K = total_3K
        weights_K = self.depth_decay ** torch.arange(len(loss_K), device=device)
        numbers = {
            "train/loss": float((weights_K * loss_K).sum() / batch.normalizer),
            "train/lr": float(self.optimizers().param_groups[0]["lr"]),  # type: ignore[union-attr]
            "epoch": batch.epoch,
        }
        accuracy_K = right_K / count_K.clamp(min=1)
        for k in range(len(loss_K)):
            numbers[f"train/loss_{k}"] = float(loss_K[k] / batch.normalizer)
            numbers[f"train/accuracy_{k}"] = float(accuracy_K[k])
        if self.onpolicy is not None:
            numbers |= self.onpolicy.take_counts()
        step = self.global_step + 1
        self._log(numbers, step=step, log=step % self.trainer.log_every_n_steps == 0)  # type: ignore[attr-defined]

    def _log(self, numbers: dict[str, float], *, step: int, log: bool) -> None:
        """To the callbacks, and to the loggers at once: `step` is the number of finished steps.

        Lightning writes after its callbacks have run, so a run killed right behind a checkpoint
        would lose the row of that step for good.
        """
        self.trainer.callback_metrics.update({k: torch.tensor(v) for k, v in numbers.items()})
        if log:
            for logger in self.loggers:
                logger.log_metrics(numbers, step=step)
                logger.save()

    # --- validation ------------------------------------------------------------------------------

    def _empty_tally(self, device: torch.device) -> Tally:
        return Tally.empty(self.drafter.measured_depths, device, bracket=self.teacher.bracket)

    def validation_numbers(self) -> dict[str, float]:
        """What the last validation measured; the loss is that of the trained depths."""
        return self.tally.summary(self.depth_decay, trained=self.drafter.num_depths)

    def own_numbers(self) -> dict[str, float]:
        """What a module measures beside that."""
        return {}

    def on_validation_epoch_start(self) -> None:
        self.tally = self._empty_tally(self.device)
        self._forget()

    def _forget(self) -> None:
        """Heads must not trust what they derived from weights that were put together anew."""
        for module in self.drafter.modules():
            if isinstance(module, Head):
                module.forget()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with self.trainer.precision_plugin.forward_context():
            depths, lesson = self.prepare(batch)
            measured = tally_batch(
                depths=depths,
                lesson=lesson,
                loss=self.loss,
                teacher=self.teacher,
                draft_ids_D=self.drafter.draft_ids_D,
                chunk_rows=self.chunk_rows,
                max_depth=self.drafter.max_depth,
                signal=batch.signal,
            )
        if batch.repeated:
            return  # only so that all processes do as many
        for total, part in zip(self.tally.tensors(), measured.tensors(), strict=True):
            total += part

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            for total in self.tally.tensors():
                total.copy_(self.trainer.strategy.reduce(total, reduce_op="sum"))  # type: ignore[arg-type]
        numbers = {f"val/{k}": v for k, v in self.validation_numbers().items()}
        numbers |= self.own_numbers()
        # Validating again (the best drafter, at the end) is not one more point of the curve.
        self._log(numbers, step=self.global_step, log=self.validated_step != self.global_step)
        self.validated_step = self.global_step

    # --- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The on-policy state of every rank (each has its own replay ring)."""
        if self.onpolicy is not None:
            states: list[Any] = [self.onpolicy.state_dict()] * self.trainer.world_size
            if self.trainer.world_size > 1:
                torch.distributed.all_gather_object(states, states[0])
            checkpoint["onpolicy"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data: TrainData = self.trainer.datamodule  # type: ignore[attr-defined]
        count_again(checkpoint["loops"]["fit_loop"], checkpoint["TrainData"]["taken"] // data.world)
        if self.onpolicy is not None:
            self.onpolicy.load_state_dict(
                dealt(checkpoint["onpolicy"], self.trainer.global_rank, self.trainer.world_size)
            )

    # --- optimisation ----------------------------------------------------------------------------

    @property
    def learning(self) -> nn.Module:
        """What is trained."""
        return self.drafter

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.learning)
        self._groups = [list(group["params"]) for group in groups]
        optimizer = self._make_optimizer(groups)
        scheduler = self._make_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the global norm. (Lightning refuses fused optimizers here, for fp16's sake.)
        Gradients that DeepSpeed keeps are clipped by itself and are not here."""
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


def _check_mask_lag(mask_lag: int, teacher: Teacher) -> None:
    if mask_lag < 0:
        raise ValueError(
            f"mask_lag={mask_lag} must not be negative: it says how many positions the mask of the "
            "tokens to learn lags behind the labels (0: not at all)."
        )
    if mask_lag and teacher.signal is not None:
        raise ValueError(
            f"mask_lag={mask_lag} counts positions behind the answers, but this teacher stores "
            f"'{teacher.signal}' for the tokens to learn alone; use mask_lag=0 or teacher=auto."
        )


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters: matrices with weight decay; norms, biases and other vectors without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
