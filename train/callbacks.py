"""What a run says while it trains, and what it keeps on disk."""

import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint

from conf.console import say
from data_prep.progress import clock
from models.drafter.base import Drafter
from train.data import Batch, TrainData
from train.module import DraftModule
from train.record import link, to_disk

LAST, PREVIOUS, BEST, KEPT = "last.ckpt", "previous.ckpt", "best", "step-{:08d}.ckpt"


class Console(Callback):
    """A banner of derived facts, then one dense line per `every_steps` optimizer steps."""

    def __init__(self, *, every_steps: int = 10) -> None:
        if every_steps < 1:
            raise ValueError(
                f"callbacks.console.every_steps={every_steps} must be 1 or more, because it is the "
                "number of steps between two lines."
            )
        self.every_steps = every_steps

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DraftModule)
        if trainer.is_global_zero:
            for line in banner(trainer, pl_module):
                say(line)
        self._start_window(trainer)
        self._began, self._first_step = time.monotonic(), trainer.global_step

    def _start_window(self, trainer: pl.Trainer) -> None:
        self._since, self._tokens, self._from = time.monotonic(), 0, trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._tokens += batch.learned
        if not batch.ends_step or not trainer.is_global_zero:
            return
        data: TrainData = trainer.datamodule  # type: ignore[attr-defined]
        step, total = trainer.global_step, data.total_steps
        if step % self.every_steps and step != total:
            return
        now = time.monotonic()
        numbers = {k: float(v) for k, v in trainer.callback_metrics.items()}
        # The time of validation is not training speed, but it is part of the time left.
        speed = self._tokens * trainer.world_size / max(now - self._since, 1e-9)
        per_step = (now - self._began) / max(1, step - self._first_step)
        say(
            f"step {step}/{total}  epoch {batch.epoch:.2f}  loss {numbers['train/loss']:.4f}  "
            f"first draft right {numbers['train/accuracy_0']:.3f}  {speed:,.0f} tokens/s  "
            f"lr {numbers['train/lr']:.2e}  {clock((total - step) * per_step)} left"
        )
        self._start_window(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if hasattr(self, "_since"):
            self._since += time.monotonic() - self._paused
        numbers = {k: float(v) for k, v in trainer.callback_metrics.items()}
        depths = range(pl_module.drafter.num_depths)  # type: ignore[union-attr]

        def each(name: str) -> str:
            return " ".join(f"{numbers[f'val/{name}_{k}']:.3f}" for k in depths)

        bracket = "val/overlap_0" not in numbers
        overlap = (
            f"between {each('overlap_at_least')} and {each('overlap_at_most')}"
            if bracket
            else each("overlap")
        )
        say(
            f"validation at step {trainer.global_step}: loss {numbers['val/loss']:.4f}  agreement "
            f"{each('agreement')}  overlap {overlap}  estimated "
            f"{numbers['val/tau']:.3f} tokens per step (chain, bonus included)"
        )


def banner(trainer: pl.Trainer, module: DraftModule) -> list[str]:
    """Derived facts, before the first step."""
    data: TrainData = trainer.datamodule  # type: ignore[attr-defined]
    drafter, target = module.plain, module.teacher.target
    trained = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in drafter.parameters() if not p.requires_grad)
    learned = data.learned_total
    vocabulary = (
        f"{drafter.vocab_size:,} tokens (all)"
        if drafter.draft_vocab_size is None
        else f"{drafter.draft_vocab_size:,} of {drafter.vocab_size:,} tokens"
    )
    sampled = [] if module.onpolicy is None else [f"On-policy: {module.onpolicy.describe()}."]
    return [
        f"Drafter: {type(drafter).__name__}, {drafter.num_depths} depths, {trained / 1e6:.2f} M "
        f"parameters trained, {frozen / 1e6:.2f} M frozen; vocabulary {vocabulary}.",
        f"Target: {target.name}, {target.num_parameters / 1e6:.1f} M parameters, frozen, "
        f"{str(target.dtype).removeprefix('torch.')} on {target.device}.",
        f"Training: {data.total_steps:,} steps, {learned:,} answer tokens "
        f"({learned / data.total_steps:,.0f} a step, {data.plan[-1].epoch:.2f} epochs), precision "
        f"{trainer.precision}, {trainer.world_size} process(es) x {data.accumulate} micro-batches; "
        f"a time estimate follows with the first line.",
        *sampled,
    ]


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt` (all that resuming needs), the one before it, and the best drafter.

    Written under another name and renamed, so a checkpoint that has its name is whole. The best
    drafter (by `monitor`) is a drafter folder: it can be loaded and decoded with as it is.
    Every `keep_every_steps` steps a checkpoint is kept for good, of which the newest `keep_limit`
    stay (null: all); they share the disk space of last.ckpt until that moves on.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        every_steps: int = 100,
        monitor: str = "val/tau",
        keep_every_steps: int | None = None,
        keep_limit: int | None = None,
    ) -> None:
        for name, value in (
            ("every_steps", every_steps),
            ("keep_every_steps", keep_every_steps),
            ("keep_limit", keep_limit),
        ):
            if value is not None and value < 1:
                raise ValueError(
                    f"callbacks.checkpoints.{name}={value} must be 1 or more, because it counts "
                    "steps or files; leave it out or give a positive number."
                )
        self.keep_every_steps, self.keep_limit = keep_every_steps, keep_limit
        self.seconds = 0.0
        self.saved_step: int | None = None
        self.folder = Path(run_dir) / "checkpoints"
        self.every_steps = every_steps
        self.monitor = monitor
        self.best: float | None = None
        self.best_step: int | None = None
        self.decided = False
        """Set once the best drafter is chosen: validating it again is no new candidate."""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best", "best_step")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if not batch.ends_step:
            return
        data: TrainData = trainer.datamodule  # type: ignore[attr-defined]
        step = trainer.global_step
        # Where validation follows at once, on_validation_end saves: a run resumed from here would
        # skip that validation.
        validates = (batch_idx + 1) % int(trainer.val_check_batch or 1) == 0
        if (self._is_due(step) or step == data.total_steps) and not validates:
            self.save(trainer)

    def _is_due(self, step: int) -> bool:
        return step % self.every_steps == 0 or (
            self.keep_every_steps is not None and step % self.keep_every_steps == 0
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DraftModule)
        if self.decided:
            return
        score = float(trainer.callback_metrics[self.monitor])
        # Among equals the later one: it was trained longer.
        if self.best is None or score >= self.best:
            self.best, self.best_step = score, trainer.global_step
            drafter = pl_module.trained or pl_module.whole_drafter()
            if trainer.is_global_zero:
                self._save_drafter(drafter)
        if pl_module.trained is None:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write last.ckpt; what it replaces becomes previous.ckpt."""
        begin = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh, last = self.folder / "writing.ckpt", self.folder / LAST
        trainer.save_checkpoint(fresh)
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            to_disk(fresh)
            if last.exists():
                # A second name first, so that there is no moment without a last.ckpt.
                link(last, self.folder / PREVIOUS)
            fresh.replace(last)
            self._keep(trainer.global_step)
            to_disk(self.folder)
        self.seconds += time.perf_counter() - begin

    def _keep(self, step: int) -> None:
        if self.keep_every_steps is None or step % self.keep_every_steps:
            return
        link(self.folder / LAST, self.folder / KEPT.format(step))
        kept = sorted(self.folder.glob("step-*.ckpt"))
        for old in kept[: -self.keep_limit] if self.keep_limit else []:
            old.unlink()

    def _save_drafter(self, drafter: Drafter) -> None:
        best, fresh, old = (self.folder / name for name in (BEST, "writing", "old"))
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        drafter.save_pretrained(fresh)
        for file in fresh.iterdir():
            to_disk(file)
        if best.exists():
            best.rename(old)
        fresh.rename(best)
        shutil.rmtree(old, ignore_errors=True)
