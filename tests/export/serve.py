"""The commands of a model card, run as they stand there."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.process import answers, last_lines, running
from decode.session import Decoder
from decode.verifier.greedy import Greedy
from export.base import HERE, Exporter, commands
from export.engine.environment import Environment
from models.drafter.base import Drafter
from models.target import Target

PATIENCE_S = 400.0
NONE: Mapping[str, str] = {}


def command(exporter: Exporter, drafter: Drafter, folder: Path, *, target: Path) -> str:
    """Write the folder; the first command of its card, with its real path and the target's."""
    folder.mkdir()
    exporter.write(drafter, folder)
    _, text = commands(exporter.usage(target=str(target), depths=drafter.num_depths))[0]
    return text.replace(HERE, str(folder))


@contextmanager
def server(
    text: str, environment: Environment, log: Path, port: int, variables: Mapping[str, str] = NONE
) -> Iterator[str]:
    """The command in a shell that finds this environment's programs first; its address, once it
    is ready."""
    url = f"http://127.0.0.1:{port}"
    with running(["bash", "-c", text], log=log, environment=_first(environment, variables)) as p:
        deadline = time.monotonic() + PATIENCE_S
        while not answers(f"{url}/health"):
            assert p.poll() is None, last_lines(log)
            assert time.monotonic() < deadline, last_lines(log)
            time.sleep(0.5)
        yield url
    assert not answers(f"{url}/health")


def run(text: str, environment: Environment, log: Path, variables: Mapping[str, str] = NONE) -> str:
    """What a command that ends prints."""
    with running(["bash", "-c", text], log=log, environment=_first(environment, variables)) as p:
        assert p.wait(PATIENCE_S) == 0, last_lines(log)
    return log.read_text()


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request as clients make it."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=200) as answer:
        return json.load(answer)


def alone(target: Target, prompt: list[int], length: int, *, ends: bool) -> list[int]:
    """What the target writes without a drafter; `ends`: to the end of the answer."""
    plain = Decoder(target=target, drafter=None, verifier=Greedy(), policy=None)
    return plain.generate(prompt, max_new_tokens=length, stop_at_eos=ends).tokens


def _first(environment: Environment, variables: Mapping[str, str]) -> dict[str, str]:
    path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
    return {**variables, "PATH": path}
