"""How vLLM is found and started, and what is said when that fails (no engine needed)."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

import conf.resolvers  # noqa: F401
from conf.check import build, check
from data_prep.server.vllm import Vllm
from models.target import Target
from tests.data_prep.common import dataset


def program(folder: Path, text: str) -> str:
    path = folder / "vllm"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_vllm_that_does_not_start_shows_its_last_words(target: Target, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    fails = program(tmp_path, f'echo "$@" > {heard}; echo "No available memory"; exit 3')
    server = Vllm(executable=fails, options="--tensor-parallel-size 8 --seed '1'")
    named = Target(model=target.model, tokenizer=target.tokenizer, name=str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"(?s)ended with 3 after .*\nNo available memory$"):
        dataset(tmp_path, server=server).prepare(named)
    words = shlex.split(heard.read_text())
    assert words[:4] == ["serve", str(tmp_path), "--served-model-name", str(tmp_path)]
    after = dict(zip(words[4::2], words[5::2], strict=True))
    assert after.pop("--port").isdecimal()
    assert int(after.pop("--max-model-len")) > 20
    assert after == {
        "--host": "127.0.0.1",
        "--dtype": "float32",
        "--generation-config": "vllm",
        "--tensor-parallel-size": "8",
        "--seed": "1",
    }
    slow = program(tmp_path, "echo loading; sleep 100")
    with pytest.raises(ValueError, match=r"(?s)is not ready after \d s.*\nloading$"):
        dataset(tmp_path, server=Vllm(executable=slow, start_seconds=0.2)).prepare(named)


def test_where_it_is_looked_for(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="is no program"):
        Vllm(executable="elsewhere/vllm").find()
    made = tmp_path / "engines" / "vllm-0.32.0"
    (made / "bin").mkdir(parents=True)
    program(made / "bin", "")
    with pytest.raises(ValueError, match="there is no `vllm` on the PATH"):
        Vllm().find()  # not stamped: half an environment
    (made / ".installed").touch()
    assert Vllm().find() == str(made / "bin" / "vllm")
    monkeypatch.setenv("PATH", str(tmp_path))
    first = program(tmp_path, "")
    assert Vllm().find() == first


@pytest.mark.parametrize(
    "words",
    [
        ["server=vllm", "server.options=--tensor-parallel-size 8"],
        ["server=running", "server.urls=[http://a:8000/v1,http://b:8000/v1]"],
    ],
)
def test_the_commands_compose(words: list[str]) -> None:
    with initialize_config_module("conf", version_base=None):
        cfg = compose("data_prep", overrides=words)
    check(cfg)
    server = build(cfg.server)
    assert build(cfg.dataset, server=server).server is server
    assert getattr(server, "options", "--tensor-parallel-size 8") == "--tensor-parallel-size 8"
    assert getattr(server, "urls", [1, 2])[1] in (2, "http://b:8000/v1")
