"""`python -m export run=<run folder> exporter=<format>`: a checkpoint that an engine loads.

With `prove=true` the engine itself decodes with it before it gets its name.
"""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import hydra
from omegaconf import DictConfig
from torch import Tensor

from conf.check import RUNTIME_NAMES, build, check, friendly_errors
from conf.console import say
from data_prep.prompts import Prompt
from data_prep.shards import ShardReader
from decode.prompts import Bench
from export.base import HERE, THERE, Exporter, commands
from export.card import in_words, model_card
from export.check import check_export
from export.choice import refuse
from export.engine.base import Engine
from export.engine.load import load_engine, load_environment
from export.gate import measure, show
from export.hf import DrafterReader
from export.parity import prove_equal
from export.served import Served
from models.drafter.base import Drafter
from models.run import Run, open_run
from models.target import Target, resolve_name

SUPPLIED = RUNTIME_NAMES | {"dataset_folder"}
"""Arguments that this command fills in, so that a config need not."""
LOOK = 128
"""Validation texts that a format may look at before it is written."""


def export(cfg: DictConfig) -> Path:
    """Write, validate and prove one export; only then does it get its name."""
    check(cfg, runtime=SUPPLIED)
    if cfg.install is not None:
        environment = load_environment(cfg.install)
        folder = environment.install()
        say(f"{environment.name} {environment.version} is in {folder}.")
        return folder
    if cfg.check is not None:
        folder = Path(cfg.check)
        say(f"{folder}: a whole export in the '{check_export(folder)}' format.")
        return folder
    exporter: Exporter = build(cfg.exporter)
    if cfg.run is None:
        raise ValueError(
            "There is no run to export; give one, for example run=runs/hydra_heads/latest, "
            "check=<folder> to validate an exported folder, or install=<engine>."
        )
    run = open_run(cfg.run)
    out = Path(cfg.out) if cfg.out is not None else run.path / "export" / exporter.name
    if out.exists():
        raise ValueError(
            f"'{out}' exists already and an export overwrites nothing; delete it, or give another "
            "folder with out=<folder>."
        )
    engine = _engine(cfg, exporter) if cfg.prove else None
    texts = _validation_texts(run, cfg.texts + LOOK)
    # Proven on other texts than those looked at, where there are enough.
    texts, looked_at = texts[: cfg.texts], texts[cfg.texts :] or texts
    # fp32 on both sides: a difference is then a fault and not a rounding.
    target = run.load_target("float32")
    drafter = exporter.cast(run.load_drafter(target))
    refuse(exporter, drafter)
    prompts = _prompts(cfg, run, target) if engine is not None else []
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".exporting-"))
    try:
        exporter.write(drafter, temporary, texts=looked_at)
        check_export(temporary)
        drafter = drafter.float()
        proof = prove_equal(
            trained=DrafterReader(drafter),
            exported=exporter.read(temporary, target),
            drafter=drafter,
            target=target,
            texts=texts,
        )
        figures = exporter.compare(temporary, texts=texts, drafter=drafter, target=target)
        served = None
        if engine is not None:
            gamma = exporter.chain_length(drafter)
            served = _prove(cfg, run, engine, temporary, drafter, target, prompts, gamma)
        record = {"proof": asdict(proof), "figures": figures}
        record["served"] = None if served is None else {"bench": cfg.bench.name, **served.as_dict()}
        (temporary / "parity.json").write_text(json.dumps(record, indent=2) + "\n")
        card = model_card(
            run=run,
            drafter=drafter,
            exporter=exporter,
            proof=proof,
            figures=figures,
            served=served,
        )
        (temporary / "README.md").write_text(card)
        _let_others_read(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{proof}{in_words(figures)}.")
    say(f"Written: {out} for {exporter.engine}; its README.md says how to use it.")
    named = str(run.config.target.name)
    usage = exporter.usage(target=named, depths=drafter.num_depths)
    usage = usage.replace(HERE, str(out)).replace(THERE, resolve_name(named))
    for language, command in commands(usage):
        say(f"Serve it with ({language}):\n{command}")
    return out


def _engine(cfg: DictConfig, exporter: Exporter) -> Engine:
    """The engine that proves this exporter's folders, installed."""
    if not exporter.served_by:
        raise ValueError(
            "prove=true was asked for, but no engine that runs here loads what exporter="
            f"{exporter.name} writes ({exporter.engine}); leave prove=false, or see "
            "docs/engines.md for the formats that one does."
        )
    name = cfg.engine or exporter.served_by[0]
    engine = load_engine(name)
    if name not in exporter.served_by:
        raise ValueError(
            f"engine={name} was asked for, but {engine.title} does not load what exporter="
            f"{exporter.name} writes; give one of {', '.join(exporter.served_by)}."
        )
    engine.refuse_dtype(cfg.dtype)
    engine.install()
    return engine


def _prove(
    cfg: DictConfig,
    run: Run,
    engine: Engine,
    folder: Path,
    drafter: Drafter,
    target: Target,
    prompts: list[Prompt],
    gamma: int,
) -> Served:
    """The engine beside our decoder; raises ValueError where they do not agree."""
    if cfg.dtype != "float32":
        target = run.load_target(cfg.dtype)
        drafter = drafter.bind(target).to(target.dtype)
    with tempfile.TemporaryDirectory(prefix="draftsmith-") as scratch:
        served = measure(
            engine,
            folder,
            target_folder=_target_folder(run, target, Path(scratch)),
            drafter=drafter,
            target=target,
            prompts=prompts,
            gamma=gamma,
            max_new_tokens=cfg.max_new_tokens,
            dtype=cfg.dtype,
            timed=cfg.timed,
        )
    show(served)
    served.insist()
    return served


def _target_folder(run: Run, target: Target, scratch: Path) -> Path:
    """The target as a plain folder: its own, or one written for this run."""
    own = Path(resolve_name(target.name))
    if own.is_dir() and run.config.target.get("adapter") is None:
        return own
    target.model.save_pretrained(scratch)  # type: ignore[operator]
    target.tokenizer.save_pretrained(scratch)
    return scratch


def _validation_texts(run: Run, count: int) -> list[Tensor]:
    """The first held-out conversations of the run's own data."""
    folder = Path(run.config.dataset.root) / run.config.dataset.name
    reader = ShardReader(folder, "val")
    return [reader[i].tokens for i in range(min(count, len(reader)))]


def _prompts(cfg: DictConfig, run: Run, target: Target) -> list[Prompt]:
    """What the engine is asked. Prompts that leave no room for the answer are left out."""
    folder = Path(run.config.dataset.root) / run.config.dataset.name
    bench: Bench = build(cfg.bench, tokenizer=target.tokenizer, dataset_folder=folder)
    room = target.config.max_position_embeddings - cfg.max_new_tokens
    longest = min(room, cfg.max_prompt_tokens)
    prompts = bench.prompts(limit=cfg.prompts, max_prompt_tokens=longest)
    if not prompts:
        raise ValueError(
            f"prompts={cfg.prompts} were asked for and bench={cfg.bench.name} has none of "
            f"{longest} tokens or less (plain text asks nothing); choose another bench, or "
            "prove=false."
        )
    return prompts


def _let_others_read(folder: Path) -> None:
    """mkdtemp and safetensors write for their owner only."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


@hydra.main(version_base=None, config_path="pkg://conf", config_name="export")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        export(cfg)


def main() -> None:
    """Entry point of `draft-export`."""
    _command()


if __name__ == "__main__":
    main()
