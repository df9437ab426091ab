"""A tuning: what it times, and that every exit of a drafter is traced, timed and confirmed."""

from pathlib import Path
from typing import Any

import pytest

from decode.answers import record
from decode.prompts import Prompt
from decode.session import Decoder
from decode.stop.exit import Exit
from decode.tree.chain import Chain
from decode.tune import TunePlan, tune
from decode.tune_real import Watching
from decode.verifier.sampling import Sampling
from models.acceptance import AcceptanceHead
from models.target import Target
from tests.decode.toy import PROMPTS
from tests.models.drafter.test_sorted_lm import sorted_lm


@pytest.mark.parametrize("reads", ["drawn", "candidate"])
def test_looks_are_timed_in_real_rounds(target: Target, reads: str) -> None:
    """Every number of every draft of every round; a head that reads candidates is asked one row
    later."""
    drafter = sorted_lm(target)
    size: dict[str, Any] = {"state_size": 32, "embedding_size": 32, "reads": reads}
    drafter.set_acceptance(AcceptanceHead(**size))
    watching = Watching(drafter.acceptance)
    policy = Chain(gamma=3, stop=watching)
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=policy)
    made = decoder.generate(PROMPTS[0], max_new_tokens=12, stop_at_eos=False)
    drafts = 3 * len(made.rounds)
    judged = drafts if reads == "drawn" else 2 * len(made.rounds)
    counts = {name: len(times) for name, times in watching.clock.items()}
    assert counts == dict.fromkeys(("row", "best", "drawn", "entropy"), drafts) | {"judged": judged}
    assert all(ms > 0 for ms in watching.signal_ms.values())
    rule = Decoder(
        target=target, drafter=drafter, verifier=Sampling(), policy=Chain(gamma=3)
    ).generate(PROMPTS[0], max_new_tokens=12, stop_at_eos=False)
    assert made.tokens == rule.tokens


def test_exits_are_settings_too(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    prompts = [Prompt(f"p{i}", tokens, "") for i, tokens in enumerate(PROMPTS)]
    recording = record(target, prompts, bench="toy", max_new_tokens=12)
    drafter = sorted_lm(target)
    plan = TunePlan(gamma=2, timed_prompts=1, confirm_prompts=len(prompts))
    made = tune(target=target, drafter=drafter, recording=recording, plan=plan, run_dir=tmp_path)
    words = [p.words for p in made.settings]
    assert [w for w in words if "stop=exit" in w] == [
        f"tree.gamma={n} stop=exit stop.exit={e}" for e in (0, 1) for n in (1, 2)
    ]
    rules = {c.rule: c for c in made.confirmed.settings}
    assert {"exit", "del_exit"} <= set(rules)
    assert rules["del_exit"].words.startswith("tree.gamma=2 stop=del_exit stop.costs=[")
    assert len(list((tmp_path / "tune").glob("trace-*"))) == 3
    assert len(prompts) == plan.confirm_prompts
    traced = {p.words: p.tokens_per_s.value for p in made.settings}
    for c in rules.values():
        assert c.said == pytest.approx(traced[c.words])
        # Greedy texts are those that were traced, so time alone can differ, and at one pace.
        assert c.tau_ratio.value == pytest.approx(1.0)
        assert c.said == pytest.approx(c.predicted * made.confirmed.pace)
        assert c.ratio.value == pytest.approx(c.measured.value / c.predicted)
    # What is predicted of an exit is what the decoder does with it.
    for place in (0, 1):
        policy = Chain(gamma=2, stop=Exit(exit=place, exit_costs=drafter.exit_costs))
        decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=policy)
        real = [decoder.generate(p.tokens, max_new_tokens=12) for p in prompts]
        rounds = [r for answer in real for r in answer.rounds]
        found = next(
            p for p in made.settings if p.words.endswith(f"=2 stop=exit stop.exit={place}")
        )
        assert found.tau.value == pytest.approx(sum(r.produced for r in rounds) / len(rounds))
