"""Drafts of an OpenVINO IR, computed by OpenVINO in its own environment."""

import contextlib
import json
import subprocess
import tempfile
import weakref
from pathlib import Path

import numpy as np
from torch import Tensor

from export.base import UNLIMITED
from export.engine.openvino import Openvino
from export.engine.process import driver_file
from models.target import Features

DRIVER = driver_file("openvino_reader_driver")


class OpenvinoReader:
    """A process that has the IR loaded; it ends with this object."""

    def __init__(self, folder: Path, layers: list[int] | None) -> None:
        self.layers = layers
        self._scratch = tempfile.TemporaryDirectory(prefix="draftsmith-")
        self._log = Path(self._scratch.name) / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(Openvino().python), "-I", str(DRIVER), str(folder.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        weakref.finalize(self, _end, self._process, self._scratch)

    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """One line to the process, one back."""
        file = None
        if self.layers is not None:
            file = Path(self._scratch.name) / "features.npy"
            joined = [features.layers[k][0].float().cpu().numpy() for k in self.layers]
            np.save(file, np.concatenate(joined, axis=-1))
        asked = {
            "tokens": tokens_1T[0].tolist(),
            "features": None if file is None else str(file),
            "drafts": UNLIMITED,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            ended = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise ValueError(
                "OpenVINO could not draft with the exported IR, expected a chain of tokens; its "
                f"last lines follow, and nothing was exported.\n{ended}"
            )
        return json.loads(line)


def _end(process: subprocess.Popen[str], scratch: tempfile.TemporaryDirectory[str]) -> None:
    """Close its input, by which it ends, and wait."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    scratch.cleanup()
