import json
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from conf.check import build
from decode.session import Decoder
from decode.tree import cost as module
from decode.tree.cost import Cost, Probe, along, cached_cost, measure_cost, read_cost
from decode.tree.sequoia import Sequoia
from decode.tree.static import TreeShape
from decode.verifier.sampling import Sampling
from models.drafter.base import Frontier
from models.target import Target
from tests.decode.toy import PROMPTS, Echo, echo


def test_along_by_hand() -> None:
    points = {1: 10.0, 5: 14.0, 9: 30.0}
    assert along(points, 1) == 10.0
    assert along(points, 4) == 13.0
    assert along(points, 7) == 22.0
    assert along(points, 10) == 34.0
    assert along({4: 8.0, 8: 10.0}, 1) == 8.0  # not below the smallest
    assert along({3: 2.0}, 99) == 2.0


def test_the_cost_of_a_tree_by_hand() -> None:
    shape = TreeShape(((0,), (1,), (2,), (0, 0), (1, 0), (0, 0, 0), (0, 0, 0, 0)))
    cost = Cost(target_ms={2: 20.0, 10: 28.0}, draft_ms=[{1: 1.0, 3: 2.0}, {1: 5.0}], round_ms=4.0)
    # 8 nodes: 26. Depth 1 steps (0) and (1): 1.5. Depths 2 and 3 step one node each: 5 + 5.
    assert cost.of(shape) == pytest.approx(4.0 + 26.0 + 1.5 + 5.0 + 5.0)
    assert cost.of(TreeShape(((0,),))) == pytest.approx(24.0)


def test_a_probe_has_the_sizes_it_says(target: Target) -> None:
    stepped: list[int] = []

    class Counting(Echo):
        def step(self, state: Any, depth: int, frontier: Frontier) -> Any:
            stepped.append(len(frontier.tokens_N))
            return super().step(state, depth, frontier)

    drafter = Counting(hidden_size=target.hidden_size, vocab_size=target.vocab_size)
    drafter.bind(target)
    probe = Probe(sizes=[(2, 1), (9, 4), (3, 16)], depth=3)
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=probe)
    made = decoder.generate(PROMPTS[0], max_new_tokens=8, stop_at_eos=False)
    count = len(made.rounds)
    assert [r.nodes for r in made.rounds] == ([2, 9, 3] * 3)[:count]
    assert stepped == ([1, 1, 1, 1, 4, 4, 1, 16, 16] * 3)[: 3 * count]
    assert [len(times) for times in probe.times] == [3] * count
    assert max(r.depth for r in made.rounds) == 1


class Slow(Echo):
    """A step below the root takes 2 ms and 1 ms a node; the target's forward is not touched."""

    def step(self, state: Any, depth: int, frontier: Frontier) -> Any:
        begin = time.perf_counter()
        found = super().step(state, depth, frontier)
        wait = 0.002 + 0.001 * len(frontier.tokens_N) if depth > 0 else 0.03
        time.sleep(max(0.0, wait - (time.perf_counter() - begin)))
        return found


def test_steps_are_timed_by_depth_and_rows(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTEXT", 8)
    drafter = Slow(hidden_size=target.hidden_size, vocab_size=target.vocab_size)
    drafter.bind(target)
    cost = measure_cost(target=target, drafter=drafter, nodes=9, depth=3)
    assert list(cost.target_ms) == [2, 8, 9]
    assert list(cost.target_ms.values()) == sorted(cost.target_ms.values())
    assert [list(depth) for depth in cost.draft_ms] == [[1, 12]] * 2
    for depth in cost.draft_ms:
        assert depth[1] >= 3.0
        assert depth[12] >= 14.0
    # The step at the root belongs to every round.
    assert cost.round_ms >= 30.0
    deep = measure_cost(target=target, drafter=drafter, nodes=2, depth=9)
    assert len(deep.draft_ms) == module.DEPTHS
    assert list(deep.target_ms) == [2]


def test_a_measurement_is_kept_and_read_again(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Cost({2: 1.0, 8: 3.5}, [{1: 0.25, 4: 0.5}], 0.125)
    calls: list[int] = []

    def fake(**given: Any) -> Cost:
        calls.append(given["nodes"])
        return made

    monkeypatch.setattr(module, "measure_cost", fake)
    asked: dict[str, Any] = {"target": target, "drafter": echo(target), "depth": 3}
    folder = tmp_path / "decode"
    assert cached_cost(**asked, nodes=8, folder=folder) == made
    assert cached_cost(**asked, nodes=8, folder=folder) == made
    assert calls == [8]
    stored = json.loads((folder / "cost.json").read_text())
    assert stored["facts"]["dtype"] == "float32"
    assert read_cost(stored["cost"]) == made
    # Other sizes, another machine: measured again.
    cached_cost(**asked, nodes=16, folder=folder)
    monkeypatch.setattr(module, "machine", lambda device: "another one")
    cached_cost(**asked, nodes=16, folder=folder)
    assert calls == [8, 16, 16]
    cached_cost(**asked, nodes=16, folder=None)
    assert calls == [8, 16, 16, 16]


def test_a_cost_given_in_the_configuration(target: Target) -> None:
    node = (
        "{_target_: decode.tree.cost.Cost, target_ms: {1: 10, 64: 40}, draft_ms: [{1: 2, 16: 3}]}"
    )
    with initialize_config_module("conf", version_base=None):
        cfg = compose("decode", overrides=["run=x", "tree=sequoia", f"tree.cost={node}"])
    policy = build(
        cfg.tree, accuracy_KR=[[0.5, 0.2]] * 3, target=target, drafter=echo(target), seed=0
    )
    assert isinstance(policy, Sequoia)
    assert policy.expected_ms == pytest.approx(
        Cost({1: 10.0, 64: 40.0}, [{1: 2.0, 16: 3.0}]).of(policy.shape)
    )
