"""Which loss on which data: a grid of short training runs from one drafter, all measured alike.

python -m scripts.study start=runs/fastdraft_pretrain/latest
python -m scripts.study start=... 'losses=[forward_kl, tvd]' overrides='["trainer.max_steps=100"]'

The axes are those of DistillSpec (Zhou et al., 2023, arXiv 2310.08461): the divergence, and who
wrote the text (people, the target, the drafter itself, or target and drafter in turn). A cell is
one `python -m train` in a process and a run folder of its own; cells that are finished are kept,
interrupted ones are resumed. All cells and the drafter they began with are then replayed on the
same recorded answers (decode/replay.py), so that differences between them are paired.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import train.__main__  # noqa: F401  (registers the resolver that conf/train.yaml uses)
from conf.check import check, friendly_errors
from conf.console import say
from decode.__main__ import SUPPLIED
from models.run import open_run
from scripts.study_measure import measure_all
from scripts.study_report import Cell, write_report
from train.resume import start_folder
from train.run import SUPPLIED as TRAIN_SUPPLIED


@dataclass(frozen=True)
class Plan:
    """One cell before it is trained: its folder, arguments of `python -m train`, its config."""

    loss: str
    data: str
    folder: Path
    arguments: list[str]
    config: DictConfig

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        try:
            return bool(open_run(self.folder).facts.get("finished"))
        except ValueError:
            return False

    @property
    def command(self) -> list[str]:
        """What trains it, or goes on training it."""
        if (self.folder / ".hydra" / "config.yaml").is_file():
            return ["python", "-m", "train", f"resume={self.folder}"]
        return ["python", "-m", "train", *self.arguments]


def study(cfg: DictConfig) -> int:
    """Train what is missing, measure everything. Returns 1 when a cell is missing at the end."""
    check(cfg, runtime=SUPPLIED)
    _check(cfg)
    start = start_folder(cfg.start).resolve()
    plans = [_plan(cfg, start, loss, data) for data in cfg.data for loss in cfg.losses]
    for plan in plans:
        check(plan.config, runtime=TRAIN_SUPPLIED)
        _check_same(plan)
    if cfg.train:
        _train(cfg, plans)
    done = [plan for plan in plans if plan.finished]
    missing = [plan.name for plan in plans if not plan.finished]
    if not done:
        raise ValueError(
            f"No cell of runs/{cfg.name} is finished, so there is nothing to measure; see the logs "
            f"in {_folder(cfg) / 'logs'}, and give the same command again to go on."
        )
    cells = [_before(start), *(_cell(plan) for plan in done)]
    panels = measure_all(cfg, cells, dataset=_dataset(plans, cfg))
    out = _folder(cfg) if cfg.out is None else Path(cfg.out)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    write_report(
        out,
        cells,
        panels,
        gamma=cfg.gamma,
        longest=max(cfg.gammas),
        seed=cfg.seed,
        settings=settings,
    )
    say(f"Written: {out / 'table.md'}, table.csv, heatmap.png and results.json")
    if missing:
        say(f"Not finished, and not in the table: {', '.join(missing)}.")
    return int(bool(missing))


def _check(cfg: DictConfig) -> None:
    if cfg.gamma not in cfg.gammas:
        raise ValueError(
            f"gamma={cfg.gamma} should be one of gammas={list(cfg.gammas)}, because all chain "
            "lengths are replayed together; add it there."
        )
    if cfg.heldout not in cfg.data:
        raise ValueError(
            f"heldout={cfg.heldout} should name a kind of data of this study "
            f"({', '.join(map(str, cfg.data))}), because its validation prompts are asked."
        )


def _plan(cfg: DictConfig, start: Path, loss: str, data: str) -> Plan:
    """The cell's run folder and its command line, composed as the command itself will."""
    folder = _folder(cfg) / f"{loss}-{data}-seed{cfg.seed}"
    arguments = [
        f"+experiment={cfg.experiment}",
        f"name={cfg.name}",
        f"start={_short(start)}",
        f"loss={loss}",
        *cfg.data[data],
        f"seed={cfg.seed}",
        *cfg.overrides,
    ]
    with _other_config():
        config = compose("train", overrides=arguments)
    config.start = str(start)  # as the run itself writes it down
    return Plan(loss, data, folder, [*arguments, f"hydra.run.dir={folder}"], config)


@contextmanager
def _other_config() -> Iterator[None]:
    """Compose another command's config inside a Hydra command: set its state aside for a moment."""
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("conf", version_base=None):
            yield
    finally:
        GlobalHydra.instance().hydra = state


def _check_same(plan: Plan) -> None:
    """A folder that is there already must have been made with the same settings."""
    file = plan.folder / ".hydra" / "config.yaml"
    if not file.is_file():
        return
    then, now = (
        _flat(OmegaConf.to_container(c, resolve=True)) for c in (OmegaConf.load(file), plan.config)
    )
    other = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
    if other:
        named = ", ".join(f"{k}: {then.get(k)} then, {now.get(k)} now" for k in other[:3])
        raise ValueError(
            f"The cell '{plan.folder}' was begun with other settings ({named}); a table of both "
            "would compare what is not alike. Give the settings it was begun with, or another name."
        )


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted key; nulls count as absent, so that a new optional key changes nothing."""
    if isinstance(node, (dict, list)):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        leaves = [_flat(v, f"{path}.{k}".lstrip(".")) for k, v in pairs]
        return {k: v for leaf in leaves for k, v in leaf.items()}
    return {} if node is None else {path: node}


def _train(cfg: DictConfig, plans: list[Plan]) -> None:
    """Run the cells that are not finished, `jobs` at a time; the output of each is in a log."""
    waiting = [plan for plan in plans if not plan.finished]
    logs = _folder(cfg) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    say(f"{len(plans) - len(waiting)} of {len(plans)} cells are finished; {cfg.jobs} at a time.")
    running: list[subprocess.Popen[bytes]] = []

    def run(plan: Plan) -> None:
        command = plan.command
        with (logs / f"{plan.name}.log").open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(cfg.threads)},
            )
            running.append(process)
            status = process.wait()
        outcome = "finished"
        if status != 0:
            last = Path(log.name).read_text(errors="replace").strip().splitlines()[-1]
            outcome = f"FAILED (status {status}), see {log.name}: {last}"
        say(f"  {plan.name}: {outcome}")

    with ThreadPoolExecutor(cfg.jobs) as pool:
        try:
            list(pool.map(run, waiting))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


def _folder(cfg: DictConfig) -> Path:
    return Path("runs") / cfg.name


def _short(path: Path) -> Path:
    """Relative to where the commands are given, when it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _before(start: Path) -> Cell:
    """The drafter that the cells began with, and its run when it belongs to one."""
    drafter = _short(start)
    try:
        run = open_run(start.parent)
    except ValueError:
        return Cell(None, None, None, drafter, "", {})
    command = shlex.join(run.facts.get("command", []))
    return Cell(None, None, drafter.parent, drafter, command, run.facts)


def _cell(plan: Plan) -> Cell:
    command = shlex.join(["python", "-m", "train", *plan.arguments])
    facts = open_run(plan.folder).facts
    return Cell(plan.loss, plan.data, plan.folder, plan.folder / "drafter", command, facts)


def _dataset(plans: list[Plan], cfg: DictConfig) -> Path:
    """The dataset whose validation prompts are the held-out ones of every cell."""
    node = next(plan.config.dataset for plan in plans if plan.data == cfg.heldout)
    return Path(node.root) / node.name


@hydra.main(version_base=None, config_path="pkg://conf", config_name="study")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        status = study(cfg)
    if status:
        raise SystemExit(status)


def main() -> None:
    """The command."""
    _command()


if __name__ == "__main__":
    main()
