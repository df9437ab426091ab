"""Finished runs side by side: the same prompts, the same recorded answers, the same shapes.

python -m scripts.families 'runs=[runs/medusa/latest, runs/eagle3/latest]'
python -m scripts.families 'runs=[runs/hass/latest]'        # adds a run to the same comparison
python -m scripts.families measure=false                    # the report of what is there
python -m scripts.families measure=false beside=medusa      # differences from another run

Every cell (run, bench, temperature, shape) is a file of its own, so the command can be interrupted
and given again, and several processes can share the work: a cell that another one is making is left
to it. See scripts/families_cells.py for the files and scripts/families_report.py for the tables.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from conf.check import check, friendly_errors
from conf.console import say
from decode.__main__ import SUPPLIED
from models.run import Run, open_run
from scripts.families_cells import OWN, SHARED, Store, label_of
from scripts.families_entry import Entry
from scripts.families_measure import Measurer
from scripts.families_report import write_report


def families(cfg: DictConfig) -> int:
    """Measure what is missing, then report everything. Returns 1 when a cell could not be made."""
    check(cfg, runtime=SUPPLIED)
    _check(cfg)
    runs = {path: open_run(path) for path in cfg.runs}
    store = Store(Path(cfg.out))
    entries = _entries(cfg, runs)
    failed: list[str] = []
    busy: list[str] = []
    if cfg.measure:
        if not entries:
            raise ValueError(
                "runs=[] names nothing to measure, expected finished run folders; give "
                "'runs=[runs/medusa/latest, ...]', or measure=false for the report alone."
            )
        settings: Any = OmegaConf.to_container(cfg, resolve=True)
        shared = {key: settings[key] for key in SHARED}
        store.agree(shared | {"shapes": list(settings["shapes"] or {})})
        measurers = [Measurer(cfg, entry, store) for entry in entries]
        for measurer in measurers:
            measurer.check()
        while measurers:
            measurer = measurers.pop(0)  # one drafter in memory at a time
            measurer.run()
            failed += measurer.failed
            busy += measurer.busy
    write_report(store, cfg.beside)
    say(f"Written: {store.out / 'table.md'}, categories.md, table.csv and tau.png")
    if busy:
        say(f"Left to another process: {len(busy)} cells ({busy[0]}, ...).")
    for line in failed:
        say(f"Not measured: {line}")
    return int(bool(failed))


def _check(cfg: DictConfig) -> None:
    reserved = [s for s in cfg.shapes or {} if s in ("chain", OWN)]
    if reserved:
        raise ValueError(
            f"shapes.{reserved[0]} has a name that is taken (chains come from gamma, '{OWN}' is "
            "that of methods without training); give the shape another name."
        )
    if cfg.gamma is None and not cfg.shapes:
        raise ValueError(
            "gamma=null and no shapes leave nothing to draft; give gamma=5, or a shape such as "
            "tree@shapes.static=static."
        )


def _entries(cfg: DictConfig, runs: dict[str, Run]) -> list[Entry]:
    """Methods without training first: they need no run of their own, but a target and prompts."""
    entries = []
    if runs:
        first = next(iter(runs.values()))
        entries = [Entry(name, first, node) for name, node in (cfg.baselines or {}).items()]
    taken = {entry.label: "a method without training" for entry in entries}
    for path, run in runs.items():
        label = label_of(path)
        if label in taken:
            raise ValueError(
                f"'{path}' would be called '{label}' in the tables, which is already "
                f"{taken[label]}; give its run folder another name."
            )
        taken[label] = f"'{path}'"
        entries.append(Entry(label, run))
    return entries


@hydra.main(version_base=None, config_path="pkg://conf", config_name="families")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        status = families(cfg)
    if status:
        raise SystemExit(status)


def main() -> None:
    """The command."""
    _command()


if __name__ == "__main__":
    main()
