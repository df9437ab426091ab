"""The prompts that drafters are measured on, as conf/bench names them."""

import pytest

from conf.check import ConfigError, build, check
from decode.__main__ import SUPPLIED
from models.target import Target
from tests.decode.test_command import ROOT, composed

EVAL = ROOT.parent / "shared" / "data" / "eval"
BENCHES = sorted(path.stem for path in (ROOT / "conf" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_composes_and_is_called_like_its_file(name: str) -> None:
    cfg = composed("run=x", f"bench={name}")
    assert cfg.bench.name == name
    if name == "file":
        with pytest.raises(ConfigError, match="path"):
            check(cfg, runtime=SUPPLIED)
        cfg = composed("run=x", "bench=file", "bench.sources.0.path=mine.jsonl")
    check(cfg, runtime=SUPPLIED)


@pytest.mark.skipif(not EVAL.is_dir(), reason=f"benchmark files are not in {EVAL}")
@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k", 1319), ("spec_bench", 480), ("alpaca", 80), ("vicuna", 80)]
)
def test_benchmarks_read_whole(
    target: Target, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    monkeypatch.setenv("DRAFTSMITH_DATA", str(EVAL.parent))
    bench = build(composed("run=x", f"bench={name}").bench, tokenizer=target.tokenizer)
    prompts = bench.prompts(limit=None, max_prompt_tokens=None)
    assert len(prompts) == count
    assert len({p.id for p in prompts}) == count
    few = {p.id for p in bench.prompts(limit=7, max_prompt_tokens=None)}
    assert len(few) == 7
    assert few < {p.id for p in prompts}
