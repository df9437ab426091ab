"""`python -m export run=<run folder> exporter=<engine>`: a checkpoint that an engine loads."""

import shutil
import tempfile
from pathlib import Path

import hydra
from omegaconf import DictConfig
from torch import Tensor

from conf.check import build, check, friendly_errors
from conf.console import say
from data_prep.shards import ShardReader
from export.base import Exporter
from export.card import model_card
from export.check import check_export
from export.hf import DrafterReader
from export.parity import prove_equal
from models.run import Run, open_run


def export(cfg: DictConfig) -> Path:
    """Write, validate and prove one export; only then does it get its name."""
    check(cfg)
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
    texts = _validation_texts(run, cfg.prove)
    # fp32 on both sides: a difference is then a fault and not a rounding.
    target = run.load_target("float32")
    drafter = exporter.cast(run.load_drafter(target))
    exporter.refuse(drafter)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".exporting-"))
    try:
        exporter.write(drafter, temporary)
        check_export(temporary)
        drafter = drafter.float()
        proof = prove_equal(
            trained=DrafterReader(drafter),
            exported=exporter.read(temporary, target),
            drafter=drafter,
            target=target,
            texts=texts,
        )
        card = model_card(run=run, drafter=drafter, exporter=exporter, proof=proof)
        (temporary / "README.md").write_text(card)
        temporary.chmod(0o755)  # mkdtemp and safetensors write for their owner only
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{proof}.")
    say(f"Written: {out} for {exporter.engine}; its README.md says how to use it.")
    return out


def _validation_texts(run: Run, count: int) -> list[Tensor]:
    """The first held-out conversations of the run's own data."""
    folder = Path(run.config.dataset.root) / run.config.dataset.name
    reader = ShardReader(folder, "val")
    return [reader[i].tokens for i in range(min(count, len(reader)))]


@hydra.main(version_base=None, config_path="pkg://conf", config_name="export")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        export(cfg)


def main() -> None:
    """Entry point of `draft-export`."""
    _command()


if __name__ == "__main__":
    main()
