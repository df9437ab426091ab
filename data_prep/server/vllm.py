"""vLLM, started here for the answers and stopped behind them."""

import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conf.console import say
from data_prep.process import answers, free_port, last_lines, running
from data_prep.server.base import Server
from models.packaged import cache_dir
from models.target import Target, resolve_name

LOOK_SECONDS = 0.5


@dataclass(kw_only=True)
class Vllm(Server):
    """`vllm serve <target>` in the target's precision, on a free port of this machine only.

    `executable` None is the `vllm` on the PATH, or else of the environment that
    `python -m export install=vllm` makes (a CPU build). `options` is what else it is told, such as
    "--tensor-parallel-size 8". `start_seconds` is how long loading may take.
    """

    executable: str | None = None
    options: str = ""
    start_seconds: float = 1800.0

    @contextmanager
    def running(self, target: Target, longest: int) -> Iterator[list[str]]:
        program = self.find()
        source = resolve_name(target.name)
        port = free_port()
        command = [
            *(program, "serve", source, "--served-model-name", target.name),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", str(target.dtype).removeprefix("torch.")),
            *("--max-model-len", str(longest)),
            *("--generation-config", "vllm"),  # none of the model's own sampling defaults
        ]
        if target.revision is not None and not Path(source).is_dir():
            command += ["--revision", target.revision]
        with tempfile.TemporaryDirectory(prefix="draftsmith-") as made:
            log = Path(made) / "vllm.log"
            say(f"vLLM is started with '{target.name}' ({program}).")
            begin = time.monotonic()
            command += shlex.split(self.options)
            quiet = {"VLLM_NO_USAGE_STATS": "1"}
            with running(command, log=log, environment=quiet) as process:
                while not answers(f"http://127.0.0.1:{port}/health"):
                    over = process.poll()
                    if over is not None or time.monotonic() - begin > self.start_seconds:
                        ended = f"ended with {over}" if over is not None else "is not ready"
                        raise ValueError(
                            f"`{' '.join(map(str, command[:3]))} ...` {ended} after "
                            f"{time.monotonic() - begin:.0f} s, expected a server; its last lines "
                            "follow. On an accelerator that holds the target of this process too, "
                            "leave it room (target.device=cpu, or "
                            "'server.options=--gpu-memory-utilization 0.5').\n"
                            f"{last_lines(log)}"
                        )
                    time.sleep(LOOK_SECONDS)
                say(f"vLLM is ready ({time.monotonic() - begin:.0f} s).")
                try:
                    yield [f"http://127.0.0.1:{port}/v1"]
                except ValueError as error:
                    if process.poll() is None:
                        raise
                    raise ValueError(
                        f"{error} The vLLM started here ended with {process.returncode}; its last "
                        f"lines follow.\n{last_lines(log)}"
                    ) from error

    def find(self) -> str:
        """The program. Raises ValueError where there is none."""
        if self.executable is not None:
            found = shutil.which(Path(self.executable).expanduser())
            if found is None:
                raise ValueError(
                    f"server.executable={self.executable} is no program; give the path of `vllm`, "
                    "or leave it out."
                )
            return found
        made = [
            folder / "bin" / "vllm"
            for folder in sorted((cache_dir() / "engines").glob("vllm-*"))
            if (folder / ".installed").is_file()
        ]
        found = shutil.which("vllm") or (str(made[-1]) if made else None)
        if found is None:
            raise ValueError(
                "server=vllm was asked for, but there is no `vllm` on the PATH; install it in an "
                "environment of its own and give its path (server.executable=<path>), or let "
                "`python -m export install=vllm` make one (a CPU build)."
            )
        return found
