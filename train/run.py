"""One training run, from a composed config to a run folder with a drafter and its numbers.

<run>/.hydra/config.yaml      the composed config
<run>/run.json                command, revision, versions, data and target hashes, drafter, results
<run>/metrics.csv             every logged step
<run>/checkpoints/            last.ckpt, previous.ckpt, best/ (a drafter folder)
<run>/drafter/                the best drafter: config.json, model.safetensors
<run>/reliability.png         of an acceptance head, with reliability.json
<run>/rank_accuracy.json      how often each rank is right at each depth (for static trees)
<run>/decode/heldout-*/       tokens per step on held-out prompts
"""

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig

import conf.resolvers  # noqa: F401  (for ${first_set:...} in conf/train.yaml)
from conf.check import RUNTIME_NAMES, build, check
from conf.console import console, is_first_process, say
from data_prep.folder import DatasetFolder
from data_prep.pipeline import Dataset
from data_prep.shards import ShardReader
from decode.measure import measure
from decode.prompts import HeldOut
from decode.report import caption, table, write
from decode.verifier.sampling import Sampling
from models.device import keep_freed_memory
from models.drafter.base import Drafter
from models.drafter.load import load_drafter
from models.target import Target
from models.vocab import choose_vocab, count_tokens
from train.acceptance import Acceptance, AcceptanceModule, Chosen, borrow
from train.callbacks import Checkpoints
from train.data import TrainData
from train.finish import Job, finish
from train.losses import RowLoss
from train.mix import Mix
from train.module import DraftModule
from train.onpolicy import OnPolicy
from train.record import facts, peak_memory, point_latest, write_config, write_json
from train.resume import (
    ResumePoint,
    find_checkpoint,
    is_finished,
    require_same_config,
    resumed_config,
    with_accumulation,
    with_fixed_start,
)
from train.strategy.place import Place, find_place
from train.strategy.target import check_shared, load_on_host
from train.teacher import Teacher
from train.writer import check_family

SUPPLIED = RUNTIME_NAMES | {
    "accuracy_KR",
    "callbacks",
    "device",
    "data",
    "loggers",
    "place",
    "run_dir",
    "resume_step",
    "seed",
    "train",
    "val",
}
"""Arguments that this command fills in, so that a config need not."""


def train(cfg: DictConfig, run_dir: Path, *, placed: bool = False) -> Path:
    """Train, or continue what lies in `run_dir`. Returns the folder.

    A run is continued when `cfg.resume` names it, or when the same command is given the folder
    again (a Slurm job that was queued again). `placed`: a resumed run takes its trainer's strategy,
    devices and nodes from `cfg` and not from the time when it was started.
    """
    point = ResumePoint(None)
    if cfg.resume is not None:
        run_dir = Path(cfg.resume)
        cfg = resumed_config(run_dir, cfg.trainer if placed else None)
        point = find_checkpoint(run_dir)
    else:
        cfg = with_fixed_start(borrow(cfg))
        if (run_dir / ".hydra" / "config.yaml").is_file():
            if is_finished(run_dir):
                say(f"{run_dir} is finished: there is nothing left to do.")
                return run_dir
            require_same_config(run_dir, cfg)
            point = find_checkpoint(run_dir)
    if point.path is not None:
        say(f"Resuming {run_dir} after step {point.step}.")
    check(cfg, runtime=SUPPLIED)
    place = find_place(devices=cfg.trainer.get("devices", 1), nodes=cfg.trainer.get("nodes", 1))
    cfg = with_accumulation(cfg, run_dir, place)
    if cfg.onpolicy is not None:
        check_family(cfg.drafter)
    if cfg.trainer.get("shard_target", False):
        check_shared(cfg, place)
    _quieten()
    dataset: Dataset = build(cfg.dataset)
    mix: Mix | None = build(cfg.mix)
    device: torch.device | None = None
    if cfg.trainer.get("shard_target", False):
        target, device = load_on_host(cfg.target)
    else:
        target = build(cfg.target)
    keep_freed_memory(device or target.device)
    if is_first_process() and not (run_dir / ".hydra" / "config.yaml").is_file():
        write_config(run_dir, cfg)
    build(cfg.teacher, target=target).check(build(cfg.loss), dataset)
    folder = dataset.prepare(target)
    if mix is not None:
        mix.prepare(target)
    job = _assemble(cfg, run_dir, target, folder, point, mix, place, device)
    if is_first_process():
        write_json(run_dir / "run.json", job.facts | {"finished": False})
    say(f"Run folder: {run_dir}")
    begin = time.perf_counter()
    job.trainer.fit(job.module, datamodule=job.data, ckpt_path=point.path, weights_only=True)
    # Of this process: a resumed run says how long its last part took.
    results: dict[str, Any] = {"train_seconds": time.perf_counter() - begin}
    results["checkpoint_seconds"] = job.checkpoints.seconds if job.checkpoints else 0.0
    results["peak_memory_bytes"] = peak_memory(job.module.teacher.target.device)
    results |= finish(job, run_dir, point.path)
    if job.module.onpolicy is not None:
        results["onpolicy"] = vars(job.module.onpolicy.totals)
    if cfg.final_decode is not None and job.trainer.is_global_zero:
        results |= _decode(cfg, run_dir, target, folder)
    if job.trainer.is_global_zero:
        write_json(run_dir / "run.json", job.facts | {"results": results, "finished": True})
        point_latest(run_dir)
        say(f"Finished: {run_dir}")
    return run_dir


def _assemble(
    cfg: DictConfig,
    run_dir: Path,
    target: Target,
    folder: DatasetFolder,
    point: ResumePoint,
    mix: Mix | None,
    place: Place,
    device: torch.device | None,
) -> Job:
    """Everything a run is made of."""
    own: Any = folder.reader("train")
    val: Any = folder.reader("val")
    # Random weights depend on the seed alone, not on what was computed before.
    torch.manual_seed(cfg.seed)
    plan: Acceptance | None = build(cfg.get("acceptance"))
    if plan is not None:
        own, val = Chosen(own, plan.temperature), Chosen(val, plan.temperature)
    train = own if mix is None else mix.reader(own)
    start = None if cfg.start is None else Path(cfg.start)
    if plan is not None:
        assert start is not None, "borrow comes before"
        drafter = load_drafter(start, target)
        coverage = coverage_of(drafter, own, target)
    else:
        drafter, coverage = _new_drafter(cfg, own, start, target)
    drafter.to(target.device)
    teacher: Teacher = build(cfg.teacher, target=target)
    teacher.choose_source(train, drafter.feature_layers if drafter.reads_features else None)
    onpolicy: OnPolicy | None = build(cfg.onpolicy, target=target, seed=cfg.seed)
    data: TrainData = build(
        cfg.data,
        train=train,
        val=val,
        seed=cfg.seed,
        epochs=cfg.trainer.get("epochs"),
        max_steps=cfg.trainer.get("max_steps"),
        accumulate=cfg.trainer.accumulate,
        world=place.world,
        online=teacher.online,
        sampled=None if onpolicy is None else onpolicy.chosen,
        layers=drafter.feature_layers,
        signal=teacher.signal,
        num_depths=drafter.num_depths,
        reads_history=drafter.reads_history,
    )
    loss: RowLoss = build(cfg.loss)
    family = DraftModule if plan is None else AcceptanceModule
    module = family(
        drafter=drafter,
        teacher=teacher,
        loss=loss,
        depth_decay=cfg.depth_decay,
        mask_lag=cfg.get("mask_lag", 0),  # runs from before it existed go on
        seed=cfg.seed,
        onpolicy=onpolicy,
        weighting=build(cfg.weighting, target=target),
        recompute=cfg.trainer.get("recompute", False),
        shards_target=device is not None,
        make_optimizer=lambda groups: build(cfg.optimizer, params=groups),
        make_scheduler=lambda optimizer: build(
            cfg.scheduler, optimizer=optimizer, total_steps=data.total_steps
        ),
    )
    if isinstance(module, AcceptanceModule):
        assert plan is not None
        module.attach(plan.head(drafter).to(target.device), plan)
    callbacks = list((build(cfg.callbacks, run_dir=run_dir) or {}).values())
    loggers = build(cfg.logger, run_dir=run_dir, save_dir=str(run_dir), resume_step=point.step)
    trainer: pl.Trainer = build(
        cfg.trainer,
        target=target,
        data=data,
        place=place,
        device=device,
        run_dir=run_dir,
        callbacks=callbacks,
        loggers=list((loggers or {}).values()),
    )
    about = facts(target=target, drafter=drafter, dataset_hash=folder.hash, coverage=coverage)
    about["dataset"] |= {
        "name": folder.manifest["name"],
        "examples": folder.manifest["splits"]["train"]["examples"],
        "tokens_to_learn": folder.manifest["splits"]["train"]["learned"],
    }
    about["micro_batches"] = data.accumulate * data.world
    about["processes"] = data.world
    keepers = [c for c in callbacks if isinstance(c, Checkpoints)]
    return Job(module, data, trainer, keepers[0] if keepers else None, about)


def _new_drafter(
    cfg: DictConfig, own: ShardReader, start: Path | None, target: Target
) -> tuple[Drafter, float]:
    """The drafter to train, begun as the recipe or `start` says, and its vocabulary's coverage."""
    drafter = make_drafter(cfg.drafter, target)
    if start is not None:
        start_from(drafter, start, target)
        return drafter, coverage_of(drafter, own, target)
    answers = own if cfg.vocab_from is None else DatasetFolder(cfg.vocab_from).reader("train")
    coverage = choose_draft_vocab(drafter, answers, target)
    drafter.bind(target).init_from(target, calibration_texts(own))
    return drafter, coverage


def make_drafter(node: Any, target: Target) -> Drafter:
    """Build a drafter for this target: its sizes come from the target, the rest from the config."""
    return build(
        node,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        target_config=target.plain_config,
    )


def choose_draft_vocab(drafter: Drafter, reader: ShardReader, target: Target) -> float:
    """The most frequent tokens to learn of the training split; returns their share of all."""
    if drafter.draft_vocab_size is None:
        return 1.0
    counts_V = learned_counts(reader, target)
    ids_D, _ = choose_vocab(counts_V, drafter.draft_vocab_size, required=target.eos_ids)
    drafter.set_vocab(ids_D)
    return coverage_of(drafter, reader, target)


def coverage_of(drafter: Drafter, reader: ShardReader, target: Target) -> float:
    """The share of the tokens to learn that can be drafted at all; says it."""
    if drafter.draft_ids_D is None:
        return 1.0
    counts_V = learned_counts(reader, target)
    coverage = float(counts_V[drafter.draft_ids_D].sum() / counts_V.sum())
    say(
        f"Draft vocabulary: {len(drafter.draft_ids_D):,} of {target.vocab_size:,} tokens, which "
        f"are {coverage:.2%} of the answer tokens to learn."
    )
    return coverage


def learned_counts(reader: ShardReader, target: Target) -> torch.Tensor:
    """How often each token is one to learn, `[V]`."""
    counts_V = torch.zeros(target.vocab_size, dtype=torch.long)
    for i in range(len(reader)):
        example = reader[i]
        counts_V += count_tokens(example.tokens, example.learn, target.vocab_size)
    return counts_V


def start_from(drafter: Drafter, folder: Path, target: Target) -> None:
    """Take over the weights and the draft vocabulary of the drafter in `folder`."""
    earlier = load_drafter(folder, target)
    if type(earlier) is not type(drafter) or earlier.draft_vocab_size != drafter.draft_vocab_size:
        raise ValueError(
            f"start={folder} holds a {type(earlier).__name__} with a draft vocabulary of "
            f"{earlier.draft_vocab_size}, but this run trains a {type(drafter).__name__} with "
            f"{drafter.draft_vocab_size}; weights only go over between equal drafters, so use the "
            "drafter settings of that run."
        )
    if earlier.draft_ids_D is not None:
        drafter.set_vocab(earlier.draft_ids_D)
    drafter.bind(target)
    try:
        drafter.start_from(earlier)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(
            f"start={folder} does not fit the drafter of this run ({reason}); use the drafter "
            "settings of that run (its .hydra/config.yaml)."
        ) from error
    say(f"Training begins with the weights of {folder}.")


def calibration_texts(reader: ShardReader, limit: int = 64) -> list[torch.Tensor]:
    """A few examples, spread evenly over the training split."""
    step = max(1, len(reader) // limit)
    return [reader[i].tokens for i in range(0, len(reader), step)][:limit]


def _decode(
    cfg: DictConfig, run_dir: Path, target: Target, folder: DatasetFolder
) -> dict[str, Any]:
    """Tokens per step of the saved drafter on held-out prompts, by the reference decoder."""
    settings = cfg.final_decode
    accuracy = json.loads((run_dir / "rank_accuracy.json").read_text())["accuracy"]
    prompts = HeldOut(dataset_folder=folder.path).prompts(
        limit=settings.limit, max_prompt_tokens=settings.max_prompt_tokens
    )
    if not prompts:
        say("The validation split holds no prompt to decode: tokens per step were not measured.")
        return {}
    drafter = load_drafter(run_dir / "drafter", target).to(target.dtype)
    policy: Any = build(
        settings.tree,
        accuracy_KR=accuracy,
        target=target,
        drafter=drafter,
        run_dir=run_dir,
        temperature=0.0,
    )
    measured = measure(
        target=target,
        drafter=drafter,
        policy=policy,
        verifier=Sampling(),
        prompts=prompts,
        max_new_tokens=settings.max_new_tokens,
        baseline=settings.baseline,
    )
    console.print(table(measured, title=caption(measured, "heldout")))
    where = write(
        run_dir / "decode" / f"heldout-{policy.name}-T0",
        measured,
        bench="heldout",
        facts={"run": str(run_dir)},
    )
    say(
        f"{measured.tau} tokens per step (bonus included) on {measured.prompts} held-out prompts, "
        f"greedy, {policy.name}; report in {where}."
    )
    return {"tau": measured.tau.value, "tau_interval": [measured.tau.low, measured.tau.high]}


def _quieten() -> None:
    """Lightning's own banner and advice say nothing that ours does not."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for pattern in (
        r"The '.*_dataloader' does not have many workers",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"The number of training batches .* is smaller than the logging interval",
        r"Checkpoint directory .* exists and is not empty",
        r"Trying to infer the `batch_size`",
        r"GPU available but not used",
        r"The `srun` command is available on your system but is not used",
        r"find_unused_parameters=True was specified in DDP constructor",
        r"`torch.distributed\..*` is deprecated",
        r"Since DeepSpeed handles gradient clipping internally",
        r"You have overridden `on_after_batch_transfer` in `LightningModule`",
    ):
        warnings.filterwarnings("ignore", message=pattern)
