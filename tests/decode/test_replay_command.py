"""`python -m decode replay=...` as a user runs it, against the command that decodes."""

import json
from pathlib import Path

import pytest

from decode.__main__ import decode
from tests.decode.test_command import composed, run  # noqa: F401


def test_a_replay_says_what_the_decoder_says(
    run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    common = [f"run={run}", "max_new_tokens=10", "dtype=float32"]
    assert decode(composed(*common, "tree.gamma=2", "baseline=false")) == 0
    settings = ["replay=chains", "replay.gammas=[1,2,3]", "replay.timed_prompts=1"]
    assert decode(composed(*common, *settings)) == 0
    real = json.loads((run / "decode" / "heldout-chain2-T0" / "results.json").read_text())
    made = json.loads((run / "replay" / "heldout-T0" / "results.json").read_text())
    assert [c["gamma"] for c in made["chains"]] == [1, 2, 3]
    assert made["chains"][1]["tau"] == real["tau"]
    assert made["chains"][1]["mbsu"] == real["mbsu"]
    assert made["chains"][1]["speedup"]["value"] == pytest.approx(
        real["tau"]["value"] / made["chains"][1]["break_even_tau"]
    )
    assert (run / "replay" / "heldout-T0" / "plot.png").is_file()
    assert f"gamma={made['best_gamma']}" in capsys.readouterr().err
    # Sampling, several answers a prompt, no timing: the best is the best by MBSU.
    sampled = [
        "temperature=0.8", "replay.samples=3", "replay.timed_prompts=0", "replay.gammas=[1,3]"
    ]  # fmt: skip
    assert decode(composed(*common, "replay=chains", *sampled)) == 0
    made = json.loads((run / "replay" / "heldout-T0.8" / "results.json").read_text())
    assert (made["prompts"], made["samples"]) == (6, 3)
    assert made["chains"][0]["speedup"] is None
    assert made["best_gamma"] == max(made["chains"], key=lambda c: c["mbsu"])["gamma"]


def test_a_replayed_tree_says_what_the_decoder_says(
    run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    common = [f"run={run}", "max_new_tokens=10", "dtype=float32", "tree=static", "tree.nodes=5"]
    assert decode(composed(*common, "baseline=false")) == 0
    assert decode(composed(*common, "replay=trees", "replay.timed_prompts=1", "floor=9")) == 1
    real = json.loads((run / "decode" / "heldout-tree5-T0" / "results.json").read_text())
    made = json.loads((run / "replay" / "heldout-tree5-T0" / "results.json").read_text())
    for name in ("tau", "tau_by_category", "alpha_by_depth", "nodes_per_round", "mbsu", "rounds"):
        assert made[name] == real[name], name
    assert made["speedup"]["value"] == pytest.approx(made["tau"]["value"] / made["break_even_tau"])
    assert (run / "replay" / "heldout-tree5-T0" / "plot.png").is_file()
    shown = capsys.readouterr().err
    assert "predicted speed-up" in shown
    assert "below the floor of 9" in shown
    with pytest.raises(ValueError, match="drafts are sampled"):
        decode(composed(f"run={run}", "replay=trees", "temperature=1", "tree.gamma=2"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["tree=static"], "follows chains only"),
        (["replay.gammas=[4]"], "chain lengths from 1 to 3"),
        (["temperature=1", "top_p=0.9"], "top_p=0.9"),
        (["temperature=1", "verifier=typical", "verifier.lossy=true"], "is lossy"),
        (["lossless=true"], "it decodes none"),
        (["floor=1"], "looks at several"),
    ],
)
def test_what_a_replay_cannot_say_is_refused(
    run: Path,  # noqa: F811
    overrides: list[str],
    sentence: str,
) -> None:
    cfg = composed(f"run={run}", "replay=chains", "replay.gammas=[1]", *overrides)
    with pytest.raises(ValueError, match=sentence):
        decode(cfg)
