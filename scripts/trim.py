"""A smaller draft vocabulary for a finished drafter (VocabTrim, arXiv 2506.22694): no training.

python -m scripts.trim run=runs/hydra_heads/latest
python -m scripts.trim run=... 'sizes=[2048, 8192]' 'data=[data/aligned, data/text]' bench=mt_bench

The ids that the counted texts use most stay (end-of-answer tokens always do); the other rows of the
vocabulary head are left out. A token that is left out can still be produced, by the target alone:
decoding stays lossless, a draft reads fewer weights, and some tokens per step are lost. Each size
is replayed greedily on the same recorded answers (decode/replay.py). What the target wrote itself
is what should be counted; a second folder in `data` shows what other text would have given.

The best size by MBSU, or `size`, is written as a run folder for the other commands, with the table
(results.json) and its picture (plot.png) in it. Its rank accuracies are those before trimming.

Shape legend: V target vocabulary.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from conf.check import build, check, friendly_errors
from conf.console import console, say
from data_prep.manifest import read_manifest
from data_prep.shards import ShardReader
from decode.__main__ import SUPPLIED
from decode.answers import record
from decode.prompts import Bench
from models.drafter.base import Drafter
from models.run import Run, open_run
from models.target import Target
from models.trimming import trimmed
from models.vocab import choose_vocab
from scripts.trim_report import Row, Trimming, best_sentence, measure_row, trim_plot, trim_table
from train.run import learned_counts


def trim(cfg: DictConfig) -> Path | None:
    """Compare the sizes and write one. None when the drafter is best as it is."""
    check(cfg, runtime=SUPPLIED)
    run = open_run(cfg.run)
    own = Path(run.config.dataset.root) / run.config.dataset.name
    folders = [Path(folder) for folder in cfg.data] or [own]
    for folder in folders:
        read_manifest(folder)
    target = run.load_target(cfg.dtype)
    drafter = run.load_drafter(target)
    sizes = _sizes(cfg, drafter)
    trimmed(run.drafter_folder, drafter, _allowed_ids(drafter)[: sizes[0]])  # refuses early
    bench: Bench = build(cfg.bench, tokenizer=target.tokenizer, dataset_folder=own)
    recording = record(
        target,
        bench.prompts(limit=cfg.limit, max_prompt_tokens=cfg.max_prompt_tokens),
        bench=bench.name,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
    )
    whole = measure_row(target, drafter, recording, gamma=cfg.gamma)
    say(f"As trained: {whole.tau} tokens per step.")
    found = Trimming(bench.name, cfg.gamma, whole, [])
    chosen_ids: dict[tuple[str, int], Tensor] = {}
    for folder in folders:
        counts_V = learned_counts(ShardReader(folder, "train"), target)
        for size in sizes:
            ids_M, coverage = _choose(counts_V, drafter, size, target)
            row = measure_row(
                target,
                trimmed(run.drafter_folder, drafter, ids_M),
                recording,
                gamma=cfg.gamma,
                data=str(folder),
                coverage=coverage,
                whole=whole,
            )
            say(f"{size:,} tokens of {folder}: {row.tau} tokens per step, MBSU {row.mbsu:.2f}.")
            chosen_ids[row.data, size] = ids_M
            found.rows.append(row)
    console.print(trim_table(found))
    say(best_sentence(found))
    pick = found.best if cfg.size is None else found.best_of(cfg.size)
    if pick is whole:
        return None
    smaller = trimmed(run.drafter_folder, drafter, chosen_ids[pick.data, pick.size])
    out = Path(cfg.out) if cfg.out else run.path / "trim" / f"{bench.name}-{pick.size}"
    return write_run(out, run, smaller, found, pick)


def _sizes(cfg: DictConfig, drafter: Drafter) -> list[int]:
    """The sizes that are smaller than what the drafter has."""
    has = drafter.draft_vocab_size or drafter.vocab_size
    asked: list[int] = [*cfg.sizes] if cfg.size is None else [*cfg.sizes, cfg.size]
    asked = sorted(set(asked))
    sizes = [size for size in asked if 0 < size < has]
    if not sizes or (cfg.size is not None and cfg.size not in sizes):
        raise ValueError(
            f"sizes={list(cfg.sizes)} and size={cfg.size} should be smaller than the {has:,} "
            "tokens this drafter drafts over (and at least 1), because trimming only leaves tokens "
            "out; give smaller ones."
        )
    if len(sizes) < len(asked):
        say(f"The drafter drafts over {has:,} tokens: compared are {', '.join(map(str, sizes))}.")
    return sizes


def _allowed_ids(drafter: Drafter) -> Tensor:
    """Target ids the drafter can draft now."""
    if drafter.draft_ids_D is not None:
        return drafter.draft_ids_D
    return torch.arange(drafter.vocab_size, device=next(drafter.parameters()).device)


def _choose(counts_V: Tensor, drafter: Drafter, size: int, target: Target) -> tuple[Tensor, float]:
    """The most frequent of the ids it has, and the share of all counted tokens they are."""
    allowed_D = _allowed_ids(drafter)
    counts_D = counts_V.to(allowed_D.device)[allowed_D]
    eos = torch.tensor(target.eos_ids, device=allowed_D.device)
    ends = torch.isin(allowed_D, eos).nonzero()[:, 0].tolist()
    places_M, _ = choose_vocab(counts_D, size, required=tuple(ends))
    return allowed_D[places_M], float(counts_D[places_M].sum() / counts_V.sum())


def write_run(out: Path, run: Run, drafter: Drafter, found: Trimming, pick: Row) -> Path:
    """The trimmed drafter as a run folder; complete when it appears. Nothing is overwritten."""
    if out.exists():
        raise ValueError(f"'{out}' exists already, and nothing is overwritten; give another out=.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".writing-"))
    try:
        drafter.save_pretrained(temporary / "drafter")
        config = run.config.copy()
        config.drafter.draft_vocab_size = pick.size
        (temporary / ".hydra").mkdir()
        OmegaConf.save(config, temporary / ".hydra" / "config.yaml")
        facts = run.facts | {"trimmed": asdict(pick) | {"run": str(run.path), "command": sys.argv}}
        (temporary / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
        accuracy = run.path / "rank_accuracy.json"
        if accuracy.is_file():
            shutil.copy(accuracy, temporary)
        (temporary / "results.json").write_text(json.dumps(asdict(found), indent=2) + "\n")
        trim_plot(found, temporary / "plot.png")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"Written: {out} (python -m decode run={out})")
    return out


@hydra.main(version_base=None, config_path="pkg://conf", config_name="trim")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        trim(cfg)


def main() -> None:
    """The command."""
    _command()


if __name__ == "__main__":
    main()
