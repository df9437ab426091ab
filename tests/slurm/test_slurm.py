"""The sbatch scripts and the launcher, on a real Slurm of one node."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.check import build
from data_prep.folder import DatasetFolder
from tests.train.conftest import Recipe
from tests.train.conftest import recipe as recipe

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if any(shutil.which(name) is None for name in ("srun", "sbatch", "slurmctld", "munged")):
        pytest.skip("Slurm is not installed (Debian: slurm-wlm and munge)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of our own can only be started as root")
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", str(Path(__file__).parent / "local.sh")]
    subprocess.run([*script, "start", str(folder)], check=True, timeout=60)
    yield
    subprocess.run([*script, "stop", str(folder)], check=True, timeout=60)


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(log: Path, *arguments: str) -> str:
    """Submit one of our scripts; returns the job's id."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", "--oversubscribe", f"--output={log}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait(job: str, log: Path, seconds: float = 240.0) -> None:
    """Until no job of that id is left; a job that is queued again need not wait its two minutes.

    Slurm compares whole seconds: a job started in the second in which it was killed is taken for
    the killed one ("Job credential revoked") and ends, so it starts some seconds later.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = run("squeue", "-h", "-r", "-o", "%A %F %T %r")
        ours = [line for line in states.splitlines() if job in line.split()[:2]]
        if not ours:
            return
        if "BeginTime" in ours[0]:
            time.sleep(3)
            run("scontrol", "update", f"jobid={job}", "StartTime=now")
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(
    slurm: None, recipe: Recipe, tmp_path: Path
) -> None:
    """Two tasks, SIGUSR1 in the middle: the same losses as one process that was left alone."""
    settings = [
        "trainer.max_steps=40",
        "trainer.epochs=null",
        "trainer.val_every_steps=10",
        "callbacks.checkpoints.every_steps=100",
        "data.tokens_per_batch=96",
        "final_decode=null",
    ]
    whole = recipe.run(tmp_path / "whole", *settings, "trainer.accumulate=2")
    ours = [o for o in recipe.overrides if not o.startswith("final_decode")]
    run_dir, log = tmp_path / "job", tmp_path / "job.log"
    arguments = ["--ntasks-per-node=2", "slurm/train.sbatch", "trainer=ddp", *ours, *settings]
    job = submit(log, *arguments, f"hydra.run.dir={run_dir}")
    rows = run_dir / "metrics.csv"
    end = time.monotonic() + 200
    while not rows.exists() or rows.read_bytes().count(b"\n") < 8:
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)
    run("scancel", "--signal=USR1", job)
    wait(job, log)
    said = log.read_text()
    stopped = re.search(r"Stopping after step (\d+) \(SIGUSR1\)", said)
    assert stopped is not None, said[-3000:]
    assert 8 <= int(stopped[1]) < 40
    assert f"Slurm job {job} is queued again" in said
    assert f"Resuming {run_dir} after step {stopped[1]}." in said
    assert rows.read_text() == (whole / "metrics.csv").read_text()
    for file in ("drafter/model.safetensors", "rank_accuracy.json"):
        assert (run_dir / file).read_bytes() == (whole / file).read_bytes()


def test_a_job_stops_before_its_time_limit_and_goes_on_in_another(
    slurm: None, recipe: Recipe, tmp_path: Path
) -> None:
    """Its five minutes are less than the margin: a step, a checkpoint, and in the queue again."""
    settings = [
        "trainer.max_steps=6",
        "trainer.epochs=null",
        "data.tokens_per_batch=96",
        "callbacks.preemption.margin_seconds=400",
        "final_decode=null",
    ]
    whole = recipe.run(tmp_path / "whole", *settings)
    ours = [o for o in recipe.overrides if not o.startswith("final_decode")]
    run_dir, log = tmp_path / "job", tmp_path / "job.log"
    arguments = ["--time=5", "slurm/train.sbatch", *ours, *settings, f"hydra.run.dir={run_dir}"]
    job = submit(log, *arguments)
    end = time.monotonic() + 200
    while not log.exists() or f"Slurm job {job} is queued again" not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)
    run("scontrol", "update", f"jobid={job}", "TimeLimit=60")
    wait(job, log)
    said = log.read_text()
    assert "Stopping after step 1 (time limit): its checkpoint is written." in said
    assert f"Resuming {run_dir} after step 1." in said
    assert said.count("Stopping after") == 1
    for file in ("metrics.csv", "drafter/model.safetensors", "rank_accuracy.json"):
        assert (run_dir / file).read_bytes() == (whole / file).read_bytes()


def test_an_array_answers_a_dataset(slurm: None, recipe: Recipe, tmp_path: Path) -> None:
    """Two elements, one of them again, and the job that joins them: the dataset of one process."""
    wanted = [o for o in recipe.overrides if o.lstrip("+").startswith(("target", "dataset"))]
    wanted = [o for o in wanted if not o.startswith("dataset.root")]
    wanted += [f"dataset.root={tmp_path / 'data'}", "dataset.respond.max_batch=5"]
    whole = recipe.compose(f"dataset.root={tmp_path / 'whole'}", "dataset.respond.max_batch=5")
    expected = build(whole.dataset).prepare(build(whole.target))
    log = tmp_path / "part-%a.log"
    array = ["--array=0-1", "--export=ALL,PARTS=2", "slurm/data_prep.sbatch", *wanted]
    job = submit(log, *array)
    wait(job, tmp_path / "part-0.log")
    parts = sorted((tmp_path / "data" / "tiny").glob("*.part-*"))
    assert [p.name[-14:] for p in parts] == ["00000-of-00002", "00001-of-00002"]
    joined = submit(tmp_path / "join.log", "slurm/data_prep.sbatch", *wanted)
    wait(joined, tmp_path / "join.log")
    assert "already there" in (tmp_path / "join.log").read_text()
    assert DatasetFolder(tmp_path / "data" / "tiny").hash == expected.hash


def test_a_sweep_through_submitit(slurm: None, recipe: Recipe, tmp_path: Path) -> None:
    ours = [o for o in recipe.overrides if not o.startswith("final_decode")]
    command = [sys.executable, "-m", "train", "--multirun", "hydra/launcher=slurm", "seed=0,1"]
    command += [*ours, "final_decode=null", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command += ["hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for number in (0, 1):
        facts = json.loads((tmp_path / "sweep" / str(number) / "run.json").read_text())
        assert facts["finished"]
    weights = [tmp_path / "sweep" / str(n) / "drafter" / "model.safetensors" for n in (0, 1)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
