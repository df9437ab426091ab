"""Environments of engines, and the programs that run in them, without installing one."""

import json
import shlex
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_prep.process import running
from export.base import HERE, commands
from export.engine.environment import STAMP, Environment, Pip
from export.engine.process import call_driver
from export.engine.vllm import Vllm, speculative_options
from export.vllm import VllmExporter
from models.drafter.base import Drafter
from models.target import Target
from tests.export.formats.drafters import eagle, eagle3, hass, medusa
from tests.export.test_gguf import causal_lm


class Small(Environment):
    name = "small"
    version = "1.0"
    steps = (Pip(("nothing==1.0",)), Pip(requirements_of="pytest", without=("pluggy", "iniconfig")))
    gigabytes = 0.5
    minutes = 0.1

    @property
    def python(self) -> Path:
        return Path(sys.executable)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    return tmp_path


def test_a_folder_is_whole_when_its_stamp_has_these_pins(cache: Path) -> None:
    small = Small()
    assert small.folder == cache / "engines" / "small-1.0"
    assert not small.is_installed()
    small.folder.mkdir(parents=True)
    assert not small.is_installed()  # begun, never finished
    (small.folder / STAMP).write_text(json.dumps(small._pins()))
    assert small.is_installed()
    assert small.install() == small.folder  # and calls nothing

    class Newer(Small):
        steps = (Pip(("nothing==2.0",)),)

    assert not Newer().is_installed()


def test_what_a_distribution_asks_for_is_read_without_what_is_left_out() -> None:
    small = Small()
    wanted = small._requirements(small.steps[1])
    names = {w.split(">")[0].split("<")[0].split(";")[0].strip() for w in wanted}
    assert "packaging" in names
    assert not names & {"pluggy", "iniconfig"}
    assert not any("extra ==" in w for w in wanted)
    assert small._requirements(small.steps[0]) == []


def test_too_little_room_is_told_before_anything_is_made(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 9 * 10**9, 10**8))
    with pytest.raises(ValueError, match=r"takes 0.5 GB .* has 0.1 GB free; make room"):
        Small().install()
    assert not (cache / "engines" / "small-1.0").exists()


def test_a_failed_step_is_a_sentence_and_leaves_no_stamp(tmp_path: Path) -> None:
    small = Small()
    with pytest.raises(ValueError, match=r"small 1.0 could not be installed.*ended with 1"):
        small._call([sys.executable, "-m", "pip", "install", "-q", str(tmp_path / "nowhere")])
    assert not small.is_installed()


def script(folder: Path, text: str) -> Path:
    file = folder / "driver.py"
    file.write_text(f"import json, sys, time\nasked = json.load(open(sys.argv[1]))\n{text}\n")
    return file


def test_a_driver_is_asked_and_answers_in_json(tmp_path: Path) -> None:
    file = script(tmp_path, "json.dump({'twice': 2 * asked['n']}, open(sys.argv[2], 'w'))")
    made = call_driver(Path(sys.executable), file, {"n": 21}, environment={}, timeout_s=30.0)
    assert made == {"twice": 42}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print('half way'); sys.exit(3)", r"(?s)ended with 3, expected an answer.*half way"),
        ("time.sleep(60)", "was not done after 1 s"),
    ],
)
def test_a_driver_that_fails_is_told_by_its_last_lines(
    tmp_path: Path, text: str, message: str
) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message):
        call_driver(Path(sys.executable), script(tmp_path, text), {}, environment={}, timeout_s=1.0)
    assert time.monotonic() - begin < 30


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_program_and_what_it_started_are_over_afterwards(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']);"
        "print(p.pid, flush=True); time.sleep(300)"
    )
    log = tmp_path / "log"
    with running([sys.executable, "-c", code], log=log, environment={}) as process:
        while not log.read_text().strip():
            time.sleep(0.01)
        child = int(log.read_text())
        assert is_running(child)
    assert process.poll() is not None
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("config", "tensor", "options"),
    [
        ({"model_type": "medusa"}, "blocks.0", {"method": "medusa"}),
        ({"medusa_num_heads": 3}, "0.0.linear", {"method": "medusa"}),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "fc.weight", {"method": "eagle3"}),
        ({"architectures": ["LlamaForCausalLM"]}, "fc.weight", {"method": "eagle"}),
        ({"architectures": ["LlamaForCausalLM"]}, "lm_head.weight", {"method": "draft_model"}),
        (
            {"architectures": ["LlamaForCausalLM"], "pard_token": 5},
            "lm_head.weight",
            {"method": "draft_model", "parallel_drafting": True},
        ),
        ({"speculators_model_type": "eagle3"}, "fc.weight", {"method": "eagle3"}),
        (
            {"speculators_model_type": "peagle"},
            "fc.weight",
            {"method": "eagle3", "parallel_drafting": True},
        ),
        ({"architectures": ["DFlashDraftModel"]}, "fc.weight", {"method": "dflash"}),
    ],
)
def test_vllm_is_told_the_method(
    tmp_path: Path, config: dict[str, object], tensor: str, options: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({tensor: torch.zeros(1)}, str(tmp_path / "model.safetensors"))
    assert speculative_options(tmp_path) == options


@pytest.mark.parametrize("make", [eagle3, eagle, hass, medusa, causal_lm])
def test_the_card_tells_vllm_what_the_gate_tells_it(
    target: Target, tmp_path: Path, make: Callable[[Target], Drafter]
) -> None:
    drafter, exporter = make(target), VllmExporter(gamma=5)
    exporter.write(drafter, tmp_path)
    ((_, text),) = commands(exporter.usage(target="the/target", depths=drafter.num_depths))
    *program, config = shlex.split(text.replace("\\\n", " "))
    assert program == ["vllm", "serve", "the/target", "--speculative-config"]
    assert json.loads(config) == {
        **speculative_options(tmp_path),
        "model": HERE,
        "num_speculative_tokens": exporter.chain_length(drafter),
    }


def test_vllm_never_sees_a_word_that_names_another_method(tmp_path: Path) -> None:
    folder = tmp_path / "my-eagle3-medusa"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "medusa"}')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    asked = Vllm().prepare(tmp_path, folder, scratch, "float32")
    assert asked["draft"] == str(scratch / "draft")
    assert (scratch / "draft").resolve() == folder
    assert asked["options"] == {"method": "medusa"}


def test_a_speculators_model_that_vllm_has_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"speculators_model_type": "xpress"}')
    with pytest.raises(ValueError, match="of type 'xpress', expected one of eagle3, peagle"):
        speculative_options(tmp_path)
