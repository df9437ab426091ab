"""`python -m export run=<run folder> exporter=<engine>`: a checkpoint that an engine loads."""

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
from export.base import Exporter
from export.card import in_words, model_card
from export.check import check_export
from export.choice import refuse
from export.hf import DrafterReader
from export.parity import prove_equal
from models.run import Run, open_run
from models.target import Target

SUPPLIED = RUNTIME_NAMES | {"dataset_folder"}
"""Arguments that this command fills in, so that a config need not."""
LOOK = 128
"""Validation texts that a format may look at before it is written."""
MAX_PROMPT_TOKENS = 1024
"""Longer prompts are left out of measure=, as `python -m decode` does."""


def export(cfg: DictConfig) -> Path:
    """Write, validate and prove one export; only then does it get its name."""
    check(cfg, runtime=SUPPLIED)
    if cfg.check is not None:
        folder = Path(cfg.check)
        say(f"{folder}: a whole export in the '{check_export(folder)}' format.")
        return folder
    exporter: Exporter = build(cfg.exporter)
    if cfg.run is None:
        raise ValueError(
            "There is no run to export; give one, for example run=runs/hydra_heads/latest, or "
            "check=<folder> to validate an exported folder."
        )
    run = open_run(cfg.run)
    out = Path(cfg.out) if cfg.out is not None else run.path / "export" / exporter.name
    if out.exists():
        raise ValueError(
            f"'{out}' exists already and an export overwrites nothing; delete it, or give another "
            "folder with out=<folder>."
        )
    if cfg.measure:
        exporter.refuse_to_measure()
    texts = _validation_texts(run, cfg.prove + LOOK)
    # Proven on other texts than those looked at, where there are enough.
    texts, looked_at = texts[: cfg.prove], texts[cfg.prove :] or texts
    # fp32 on both sides: a difference is then a fault and not a rounding.
    target = run.load_target("float32")
    drafter = exporter.cast(run.load_drafter(target))
    refuse(exporter, drafter)
    prompts = _prompts(cfg, run, target) if cfg.measure else []
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
        both = {"drafter": drafter, "target": target}
        figures = exporter.compare(temporary, texts=texts, **both)
        served = None
        if prompts:
            length = cfg.max_new_tokens
            served = exporter.measure(temporary, prompts=prompts, max_new_tokens=length, **both)
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
        temporary.chmod(0o755)  # mkdtemp and safetensors write for their owner only
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{proof}{in_words(figures)}.")
    if served is not None:
        say(f"{served.sentence()}.")
    say(f"Written: {out} for {exporter.engine}; its README.md says how to use it.")
    return out


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
    prompts = bench.prompts(limit=cfg.measure, max_prompt_tokens=min(room, MAX_PROMPT_TOKENS))
    if not prompts:
        raise ValueError(
            f"measure={cfg.measure} prompts were asked for and bench={cfg.bench.name} has none of "
            f"{MAX_PROMPT_TOKENS} tokens or less (plain text asks nothing); choose another bench, "
            "or measure=0."
        )
    return prompts


@hydra.main(version_base=None, config_path="pkg://conf", config_name="export")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        export(cfg)


def main() -> None:
    """Entry point of `draft-export`."""
    _command()


if __name__ == "__main__":
    main()
