"""The whole command on a tiny run: learns, stays exact, resumes, never serves a worse drafter."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from conf.check import build
from decode.session import Decoder
from decode.verifier.sampling import Sampling
from models.drafter.load import load_drafter
from models.run import open_run
from models.target import Target
from scripts.online import online
from tests.train.online.tiny_stream import GREEDY, learner, medusa, prompts, serve
from train.online.acceptance import chances, replay_rounds
from train.online.folder import STATE
from train.online.stream import Asked, Stream

ROOT = Path(__file__).parents[2]
WORDS = ("the cat sat", "on the mat", "and a dog", "ran to", "what is two", "plus four", "please")
FAST = [
    "tree.gamma=3",
    "max_new_tokens=16",
    "interval=4",
    "window=4",
    "optimizer.lr=1e-2",
    "updates.steps=24",
    "updates.prompts=8",
]


@pytest.fixture(scope="module")
def run(target: Target, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an untrained Medusa."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    medusa(target).save_pretrained(folder / "drafter")
    config = {
        "target": {
            "_target_": "models.target.load_target",
            "name": str(target_dir),
            "dtype": "float32",
            "device": "cpu",
        },
        "dataset": {"root": str(folder.parent / "data"), "name": "words"},
    }
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
    facts = {"fingerprint": target.fingerprint(), "template_hash": target.template_hash()}
    (folder / "run.json").write_text(json.dumps({"target": facts, "finished": True}))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two benches of eight prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    rng = random.Random(0)
    nodes = []
    for name in ("first", "second"):
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(8)]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": p, "completion": "-"}) + "\n" for p in lines))
        source = f"{{_target_: data_prep.source.files.Files, path: {file}, name: {name}}}"
        nodes.append(f"{{_target_: decode.prompts.Questions, name: {name}, sources: [{source}]}}")
    return nodes


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base=None):
        return compose("online", overrides=list(overrides))


def repeated(words: list[str], times: int = 3) -> str:
    return f"streams=[{', '.join([words[0]] * times)}]"


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "online.json").read_text())


def without_times(out: Path) -> dict[str, Any]:
    """online.json less what a clock says."""
    found = report(out)
    del found["command"], found["revision"]
    for row in found["prompts"]:
        del row["seconds"]
    for row in found["events"]:
        del row["seconds"], row["waited"]
    return found


def same(a: Path, b: Path) -> None:
    assert without_times(a) == without_times(b)
    weights = [f / "drafter" / "model.safetensors" for f in (a, b)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture(scope="module")
def whole(run: Path, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three times the same eight prompts, in the background."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return online(composed(f"run={run}", f"out={out}", repeated(words), *FAST))


def test_a_repeated_stream_is_learned(whole: Path) -> None:
    found = report(whole)
    first = [row for row in found["prompts"] if row["n"] < 8]
    again = [row for row in found["prompts"] if row["n"] >= 16]
    assert {row["version"] for row in first[:4]} == {0}
    before = sum(row["served"]["rounds"] for row in first)
    after = sum(row["served"]["rounds"] for row in again)
    assert sum(row["tokens"] for row in first) == sum(row["tokens"] for row in again)
    assert after < 0.8 * before, f"{before} rounds became {after}"
    assert found["summary"]["decisions"]["swapped"] >= 2
    # The first drafter on the same answers is what it was: the same both times.
    assert [row["frozen"] for row in first] == [row["frozen"] for row in again]
    assert found["prompts"][0]["frozen"] == found["prompts"][0]["served"]
    half = found["summary"]["parts"]["second_half"]
    assert half["gain"]["value"] == pytest.approx(half["online"]["value"] / half["frozen"]["value"])
    assert half["gain"]["low"] > 1.1
    assert (whole / "online.png").stat().st_size > 10_000


def test_every_swap_was_a_gain_beyond_its_error(whole: Path) -> None:
    for event in report(whole)["events"]:
        d = event["decision"]
        assert d["gain"] == pytest.approx(d["shadow"] - d["serving"])
        assert (d["decision"] == "swapped") == (d["gain"] > 0 and d["gain"] >= 1.64 * d["error"])
        assert d["prompts"] == 4
        assert event["learned"]["last_loss"] > 0.0


def test_greedy_answers_are_the_targets_own_throughout(target: Target, whole: Path) -> None:
    """Whatever is swapped in: losslessness does not depend on the drafter."""
    answers = torch.load(whole / STATE, weights_only=True)["answers"]
    plain = Decoder(target=target, drafter=None, verifier=Sampling(), policy=None)
    cfg = OmegaConf.load(whole / "online.yaml")
    asked = [
        prompt
        for bench in build(cfg.streams, tokenizer=target.tokenizer, dataset_folder=None)
        for prompt in bench.prompts(limit=None, max_prompt_tokens=None)
    ]
    assert len(asked) == len(answers) == 24
    for prompt, answer in zip(asked, answers, strict=True):
        assert plain.generate(prompt.tokens, max_new_tokens=16).tokens == answer


def test_the_output_is_a_run_with_the_drafter_that_was_served(target: Target, whole: Path) -> None:
    found = open_run(whole)
    drafter = load_drafter(found.drafter_folder, target)
    state = torch.load(whole / STATE, weights_only=True)["learner"]["weights"]
    for name, value in drafter.state_dict().items():
        assert torch.equal(value, state[name])
    assert found.facts["online"]["prompts"] == 24


def test_the_thread_changes_nothing_but_the_time(
    run: Path, words: list[str], whole: Path, tmp_path: Path
) -> None:
    settings = [f"run={run}", f"out={tmp_path / 'out'}", repeated(words), *FAST]
    same(online(composed(*settings, "background=false")), whole)


# 2: before the first boundary; 4, 8: at one; 13: inside an interval, a job under way; 23: the end.
@pytest.mark.parametrize("prompt", [2, 4, 13, 23])
def test_resumed_is_the_same_stream(
    run: Path,
    words: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: int,
) -> None:
    out = tmp_path / "out"
    serve_one = Stream._serve

    def stop(self: Stream, asked: Asked) -> None:
        if len(self.records) == prompt:
            raise KeyboardInterrupt
        serve_one(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "_serve", stop)
        with pytest.raises(KeyboardInterrupt):
            online(composed(f"run={run}", f"out={out}", repeated(words), *FAST))
    assert not (out / "drafter").exists()
    torch.manual_seed(123)  # whatever the random state was
    assert online(composed(f"resume={out}")) == out
    same(out, whole)


@pytest.mark.slow
def test_killed_and_resumed(run: Path, words: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.online"]
    settings = [f"run={run}", f"out={out}", repeated(words), *FAST]
    killed = subprocess.Popen(
        [*command, *settings], cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 120
    while not (out / STATE).is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (out / STATE).is_file()
    done = subprocess.run(
        [*command, f"resume={out}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    same(out, whole)


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_a_poisoned_update_is_never_served(
    words: list[str], whole: Path, tmp_path: Path, clip: str
) -> None:
    """A learning rate of 1000 on a drafter that knows the stream: each update is thrown away and
    the rate halved."""
    out = tmp_path / "out"
    poison = [*FAST, "optimizer.lr=1000", f"updates.clip={clip}"]
    found = report(online(composed(f"run={whole}", f"out={out}", repeated(words, 2), *poison)))
    events = found["events"]
    assert [e["decision"]["decision"] for e in events] == ["reset"] * 3
    assert [e["decision"]["lr"] for e in events] == [500.0, 250.0, 125.0]
    assert {row["version"] for row in found["prompts"]} == {0}
    assert all(row["served"] == row["frozen"] for row in found["prompts"])
    for name in ("model.safetensors", "config.json"):
        assert (out / "drafter" / name).read_bytes() == (whole / "drafter" / name).read_bytes()


def test_a_change_of_bench_is_adapted_to(run: Path, words: list[str], tmp_path: Path) -> None:
    """Eight prompts twice, then eight others three times."""
    order = ", ".join([words[0], words[0], words[1], words[1], words[1]])
    settings = [f"run={run}", f"out={tmp_path / 'out'}", f"streams=[{order}]", *FAST]
    found = report(online(composed(*settings)))
    assert set(found["summary"]["parts"]) == {"all", "second_half", "first", "second"}
    new, known = found["prompts"][16:24], found["prompts"][32:]
    assert {row["bench"] for row in new + known} == {"second"}
    assert sum(r["served"]["rounds"] for r in known) < 0.8 * sum(r["served"]["rounds"] for r in new)


def test_sampling_and_trees_are_served_too(run: Path, words: list[str], tmp_path: Path) -> None:
    warm = composed(
        f"run={run}", f"out={tmp_path / 'T1'}", repeated(words, 2), *FAST, "temperature=1"
    )
    found = report(online(warm))
    assert len(found["events"]) == 3
    # Expected rounds of the drafter that served the first prompts, against its real ones.
    real = sum(row["served"]["rounds"] for row in found["prompts"][:8])
    expected = sum(row["frozen"]["rounds"] for row in found["prompts"][:8])
    assert expected == pytest.approx(real, rel=0.15)
    accuracy = {"accuracy": [[0.3, 0.2, 0.1]] * 3, "positions": 9}
    (run / "rank_accuracy.json").write_text(json.dumps(accuracy))
    settings = [f"run={run}", f"out={tmp_path / 'tree'}", repeated(words), *FAST[1:]]
    tree = online(composed(*settings, "tree=static", "tree.nodes=7", "frozen=false"))
    first, *_, last = (
        sum(row["served"]["rounds"] for row in report(tree)["prompts"][i : i + 8])
        for i in (0, 8, 16)
    )
    assert last < first
    assert report(tree)["prompts"][0]["frozen"] is None


def test_replay_keeps_what_was_right(target: Target) -> None:
    """Learn A, then B from errors alone or with replay: A is forgotten less with it."""
    a, b = prompts(target, 8, seed=0), prompts(target, 8, seed=1)

    def accepted_on_a(replay: float) -> tuple[float, float]:
        taught = learner(target, steps=20, prompts=8, replay=0.5)
        first = []
        for job in range(4):
            first = serve(target, taught.shadow, a)
            taught.learn(job, first, [])
        before = [replay_rounds(chances(taught.shadow, one, GREEDY)) for one in first]
        taught.updates.replay = replay
        for job in range(4, 8):
            taught.learn(job, serve(target, taught.shadow, b), first)
        after = [replay_rounds(chances(taught.shadow, one, GREEDY)) for one in first]
        return sum(r.accepted for r in before), sum(r.accepted for r in after)

    before, alone = accepted_on_a(0.0)
    same_before, replayed = accepted_on_a(0.5)
    assert before == same_before
    assert before > 60
    assert replayed > 0.8 * before
    assert replayed > alone + 0.1 * before


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["run=null"], "run folder"),
        (["streams=[gsm9k]"], "known are .*gsm8k"),
        (["window=2", "interval=4"], "raise window"),
        (["updates.replay=1.0"], "errors have to be left"),
        (["tree=static", "tree.nodes=5"], "frozen=false"),
        (["verifier=typical", "verifier.lossy=true"], "frozen=false"),
        (["+updates.step=3"], "did you mean 'steps'"),
        (["resume=nowhere"], "online.yaml is missing"),
        (["tree.gamma=9"], "tree.gamma=3 or less"),
        (["tree=dynamic", "frozen=false"], "use tree=chain or tree=static"),
    ],
)
def test_user_errors_are_one_sentence(
    run: Path, words: list[str], tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    settings = [f"run={run}", f"out={tmp_path / 'out'}", repeated(words, 1)]
    with pytest.raises(ValueError, match=sentence):
        online(composed(*settings, *overrides))
