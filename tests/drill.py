"""Kill data preparation, training, decoding and export at random moments; nothing may be lost.

    python -m tests.drill folder=/tmp/drill kills=100 seed=0

Every disturbed attempt is a process of its own (forked from this one, where everything is imported
already) that runs the real command. The same command is then given again until it ends, and what it
has made must equal what an undisturbed one made. Printed: how many of each kind were survived.

    SIGKILL, SIGTERM      at a random moment of the time an undisturbed attempt took
    full disk             no file may grow beyond a random size (RLIMIT_FSIZE)
    corrupted shard       a byte of a token shard is changed before training
    corrupted checkpoint  a byte of last.ckpt is changed after a kill
    a rank that dies      SIGKILL for one of two processes of a training
    a dead server         SIGKILL for the server that answers, with requests in flight
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.std import tqdm

import data_prep.__main__
import decode.__main__
import export.__main__
import train.__main__
from tests.data_prep.serving import Serving
from tests.tiny import tiny_target

MAINS: dict[str, Callable[[], None]] = {
    "data_prep": data_prep.__main__.main,
    "train": train.__main__.main,
    "decode": decode.__main__.main,
    "export": export.__main__.main,
}
ROOT = Path(__file__).parents[1]
WORDS = ("the cat sat", "on the mat", "and a dog", "ran to", "what is two", "plus four", "please")


@dataclass
class Attempt:
    """A command in a process of its own."""

    command: str
    arguments: list[str]
    log: Path
    largest_file: int | None = None

    def start(self) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if self.largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, self.largest_file))
            sys.argv = [self.command, *self.arguments]
            MAINS[self.command]()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:  # noqa: BLE001  (whatever a full disk does to a library)
            print(repr(error), file=sys.stderr)  # noqa: T201
        finally:
            os._exit(code)

    def run(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.start(), 0)[1])

    def killed(self, number: signal.Signals, after: float) -> bool:
        """Whether it was still running when the signal came, and ended by it."""
        pid = self.start()
        end = time.monotonic() + after
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, self.log.read_text()[-3000:]
                return False
            time.sleep(0.002)
        os.kill(pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


class Drill:
    """The four stages on a tiny model, undisturbed once; then again and again, disturbed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.survived: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        folder.mkdir(parents=True)
        target = tiny_target()
        target.model.save_pretrained(folder / "target")  # type: ignore[operator]
        target.tokenizer.save_pretrained(folder / "target")
        rng = random.Random(0)
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(40)]
        rows = [json.dumps({"prompt": p, "completion": "-"}) + "\n" for p in lines]
        (folder / "prompts.jsonl").write_text("".join(rows))
        self.reference = folder / "reference"
        for command in MAINS:
            begin = time.monotonic()
            attempt = self.attempt(command, self.reference)
            assert attempt.run() == 0, attempt.log.read_text()[-3000:]
            self.seconds[command] = time.monotonic() - begin

    def attempt(self, command: str, where: Path, *, ranks: int = 1) -> Attempt:
        source = f"{{_target_: data_prep.source.files.Files, path: {self.folder}/prompts.jsonl}}"
        data = [f"target.name={self.folder / 'target'}", "target.dtype=float32"]
        data += ["target.device=cpu", "dataset=tiny", f"dataset.root={where / 'data'}"]
        data += [f"dataset.sources=[{source}]", "dataset.respond.max_batch=4"]
        data += ["+dataset.capture={_target_: data_prep.stage.capture.Capture, dtype: float32}"]
        run = where / "run"
        arguments = {
            "data_prep": [*data, f"hydra.run.dir={where / 'hydra'}", "hydra.output_subdir=null"],
            "train": [
                *data,
                "+experiment=hydra_heads",
                "drafter.draft_vocab_size=64",
                "data.tokens_per_batch=96",
                "trainer.precision=float32",
                "trainer.epochs=null",
                "trainer.max_steps=24",
                "trainer.val_every_steps=10",
                "callbacks.checkpoints.every_steps=3",
                "final_decode=null",
                f"hydra.run.dir={run}",
                *(["trainer=ddp", "trainer.devices=2"] if ranks > 1 else ["trainer.accumulate=2"]),
            ],
            "decode": [f"run={run}", "limit=3", "max_new_tokens=12", "bench=heldout"],
            "export": [f"run={run}", "exporter=hf", "texts=2"],
        }
        where.mkdir(parents=True, exist_ok=True)
        return Attempt(command, arguments[command], where / f"{command}.log")

    def round(self, command: str) -> None:
        """One stage, disturbed up to three times, then left alone and compared."""
        where = self.folder / "round"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        earlier = {"data_prep": [], "train": ["data"], "decode": ["data", "run"]}
        for name in earlier.get(command, ["data", "run"]):
            shutil.copytree(self.reference / name, where / name, symlinks=True)
        if command in ("decode", "export"):
            self._point(where)
            shutil.rmtree(where / "run" / command, ignore_errors=True)
        happened: list[str] = []
        for _ in range(self.rng.randint(1, 3)):
            kind = self.rng.choice(["SIGKILL", "SIGTERM", "full disk", *self._own(command)])
            if self._disturb(kind, command, where):
                happened.append(kind)
        if not exported(command, where):
            last = self.attempt(command, where)
            assert last.run() == 0, (happened, last.log.read_text()[-3000:])
        self._compare(command, where, happened)
        self.survived.update(happened)

    def _own(self, command: str) -> list[str]:
        return ["corrupted shard", "corrupted checkpoint"] if command == "train" else []

    def _disturb(self, kind: str, command: str, where: Path) -> bool:
        if exported(command, where):
            return False
        attempt = self.attempt(command, where)
        if kind == "full disk":
            attempt.largest_file = self.rng.randint(2_000, 400_000)
            return attempt.run() != 0
        if kind == "corrupted shard":
            return flip(self.rng, self.rng.choice([*(where / "data").rglob("tokens-*.parquet")]))
        number = signal.Signals[kind] if kind.startswith("SIG") else signal.SIGKILL
        killed = attempt.killed(number, self.rng.uniform(0.1, 1.0) * self.seconds[command])
        if kind == "corrupted checkpoint":
            return flip(self.rng, where / "run" / "checkpoints" / "last.ckpt")
        return killed

    def rank_dies(self) -> None:
        """Two processes; the one that the first has started is killed, and the first must end."""
        where = self.folder / "ranks"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        shutil.copytree(self.reference / "data", where / "data")
        # A process of its own: what Lightning starts as the second one is this command again.
        arguments = self.attempt("train", where, ranks=2).arguments
        command = [sys.executable, "-m", "train", *arguments]
        log = where / "train.log"
        with log.open("wb") as output:
            first = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            rows = where / "run" / "metrics.csv"
            while not rows.exists() or rows.read_bytes().count(b"\n") < 8:
                assert first.poll() is None, log.read_text()[-3000:]
                time.sleep(0.005)
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
            ours = [c for c in children if b"train" in Path(f"/proc/{c}/cmdline").read_bytes()]
            os.kill(int(ours[0]), signal.SIGKILL)
            assert first.wait(120) != 0
            again = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=300)
        assert again.returncode == 0, log.read_text()[-3000:]
        self._compare("train", where, ["a rank that dies"], exact=False)
        self.survived["a rank that dies"] += 1

    def server_dies(self) -> None:
        """The command must end, and go on with the server that comes after."""
        where = self.folder / "served"
        shutil.rmtree(where, ignore_errors=True)
        attempt = self.attempt("data_prep", where)
        server, port = serve()
        attempt.arguments += ["server=running", f"server.urls=[http://127.0.0.1:{port}/v1]"]
        attempt.arguments += ["server.concurrency=2", "server.patience_seconds=0.5"]
        asking = attempt.start()
        partial = where / "data" / "tiny" / "respond.jsonl.partial"
        lines = self.rng.randint(2, 12)
        while not partial.exists() or partial.read_bytes().count(b"\n") < lines:
            assert os.waitpid(asking, os.WNOHANG)[0] == 0, attempt.log.read_text()[-3000:]
            time.sleep(0.002)
        end(server)
        assert os.waitstatus_to_exitcode(os.waitpid(asking, 0)[1]) == 2
        assert "No server has answered" in attempt.log.read_text()
        server, _ = serve(port)
        assert attempt.run() == 0, attempt.log.read_text()[-3000:]
        end(server)
        self._compare("served", where, ["a dead server"])
        self.survived["a dead server"] += 1

    def _point(self, where: Path) -> None:
        """A copied run names the data beside it."""
        config = where / "run" / ".hydra" / "config.yaml"
        config.write_text(config.read_text().replace(str(self.reference), str(where)))

    def _compare(
        self, command: str, where: Path, happened: list[str], *, exact: bool = True
    ) -> None:
        for name in RESULTS[command]:
            ours, theirs = (sorted(d.glob(name)) for d in (where, self.reference))
            if command == "decode":  # a measurement is written beside an earlier one
                theirs *= len(ours)
            assert [p.name for p in ours] == [p.name for p in theirs] != [], (name, happened)
            for a, b in zip(ours, theirs, strict=True):
                same = comparable(a) == comparable(b) if exact or a.suffix != ".csv" else True
                assert same, f"{a} differs from {b} after {happened}"


RESULTS = {
    "served": ["data/tiny/*/*.parquet", "data/tiny/*/*.safetensors"],
    "data_prep": ["data/tiny/manifest.json", "data/tiny/*/tokens-*.parquet"],
    "train": ["run/metrics.csv", "run/drafter/model.safetensors", "run/rank_accuracy.json"],
    "decode": ["run/decode/*/results.json"],
    "export": ["run/export/hf/model.safetensors", "run/export/hf/config.json"],
}
"""What must be equal in the end."""


def serve(port: int = 0) -> tuple[int, int]:
    """A server of the target in a process of its own: its id and port."""
    serving = Serving(tiny_target(), port=port)
    pid = os.fork()
    if not pid:
        serving.http.serve_forever()
    serving.http.server_close()
    return pid, serving.port


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def exported(command: str, where: Path) -> bool:
    """What an export has finished it never writes over: killed behind that, it was done."""
    return command == "export" and (where / "run" / "export" / "hf").is_dir()


def comparable(path: Path) -> Any:
    """A file's content; of measurements what is no time."""
    if path.name != "results.json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    return {k: content[k] for k in ("tau", "alpha_by_depth", "prompts", "tokens") if k in content}


def flip(rng: random.Random, path: Path) -> bool:
    """Change one byte of a file, if it is there."""
    if not path.is_file():
        return False
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)
    return True


def drill(folder: Path, kills: int, seed: int, ranks: int, servers: int) -> Counter[str]:
    """Rounds over all stages until `kills` disturbances were survived."""
    torch.set_num_threads(1)
    # Forked processes would share the lock of progress bars: one that is killed while it holds it
    # would stop all that come after it. Real commands share nothing.
    tqdm.set_lock(threading.RLock())
    made = Drill(folder, seed)
    turn = 0
    while made.survived.total() < kills:
        made.round(list(MAINS)[turn % len(MAINS)])
        turn += 1
    for _ in range(ranks):
        made.rank_dies()
    for _ in range(servers):
        made.server_dies()
    counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(made.survived.items()))
    print(f"Survived, with nothing lost, in {turn + ranks + servers} rounds: {counts}.")  # noqa: T201
    return made.survived


if __name__ == "__main__":
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    drill(
        Path(settings["folder"]),
        int(settings.get("kills", 10)),
        int(settings.get("seed", 0)),
        int(settings.get("ranks", 1)),
        int(settings.get("servers", 1)),
    )
