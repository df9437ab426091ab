"""Exits of one network: what each computes, when a draft leaves, and what it leaves behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.drafter.base import Frontier
from models.drafter.load import load_drafter
from models.drafter.sorted_lm import SortedLm
from models.target import Target
from tests.models.drafter.test_causal_lm import FROZEN, OWN, TIED, text
from tests.tiny import tiny_target

ZERO = torch.zeros(1, dtype=torch.long)


def sorted_lm(target: Target, **settings: Any) -> SortedLm:
    torch.manual_seed(0)
    drafter = SortedLm(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_config=target.plain_config,
        **({"num_layers": 4, "exits": [1, 2, 4], "head": FROZEN} | settings),
    )
    drafter.bind(target)
    drafter.init_from(target)
    return drafter.eval()


def test_an_exit_is_the_norm_of_the_residual_stream(target: Target) -> None:
    """With all layers of the target: norm(h^1), norm(h^2) and f itself."""
    drafter = sorted_lm(target)
    tokens_BT = text(target)
    features = target.forward(tokens_BT, layers=(1, 2))
    norm = target.model.get_decoder().norm
    wanted = [norm(features.layers[1]), norm(features.layers[2]), features.final_BTd]
    depths = list(drafter.unroll(features, tokens_BT))
    assert [depth.shift for depth in depths] == [0, 0, 0]
    for depth, expected in zip(depths, wanted, strict=True):
        torch.testing.assert_close(depth.states_BNd, expected, rtol=1e-4, atol=1e-4)


class Scripted(SortedLm):
    """Leaves where a script says, so that every pattern of exits is met."""

    script: list[int]

    def _sure(self, e: int, states_Nd: Tensor) -> bool:
        if e == self.script[0]:
            self.script.pop(0)
            return True
        if self.script[0] == len(self.exits) - 1 and e == self.script[0] - 1:
            self.script.pop(0)
        return False


@pytest.mark.parametrize("script", [[0, 0, 2, 1, 0, 2], [2, 1, 0, 0, 1, 2], [0, 0, 0, 0, 0, 2]])
def test_drafting_states_are_the_training_states_of_the_exit(
    target: Target, script: list[int]
) -> None:
    """Tokens that left early are read in deeper layers later, with the same result; also after
    some of the draft was refused."""
    drafter = sorted_lm(target, thresholds=[0.5, 0.5])
    tokens_BT = text(target)
    features = target.forward(tokens_BT)
    depths = list(drafter.unroll(features, tokens_BT))
    drafter.__class__ = Scripted
    drafter.script = list(script)  # type: ignore[attr-defined]
    state = drafter.start(features[:, :6], tokens_BT[:, :7])
    place = 6
    for accepted in (2, 0):
        below = state
        for k in range(3):
            exit_now = script.pop(0)
            token_1 = tokens_BT[0, place + k : place + k + 1]
            below, states_1d = drafter.step(below, k, Frontier(token_1, ZERO))
            wanted_d = depths[exit_now].states_BNd[0, place + k]
            torch.testing.assert_close(states_1d[0], wanted_d, rtol=1e-4, atol=1e-4)
        new = tokens_BT[:, place + 1 : place + accepted + 2]
        state = drafter.extend(state, features[:, : accepted + 1], new)
        place += accepted + 1
    assert drafter.script == []  # type: ignore[attr-defined]


def test_a_tree_after_an_early_exit(target: Target) -> None:
    """Chain, fork, and a deep step below the fork: each branch as if drafted alone. Then the second
    branch is accepted and the draft goes on deep from there."""
    drafter = sorted_lm(target, thresholds=[0.5, 0.5])
    drafter.__class__ = Scripted
    drafter.script = [0, 0, 2, 2]  # type: ignore[attr-defined]
    tokens = text(target)[:, :7]
    state = drafter.start(target.forward(tokens[:, :6]), tokens)
    below, _ = drafter.step(state, 0, Frontier(tokens[0, -1:], ZERO))
    below, _ = drafter.step(below, 1, Frontier(torch.tensor([11, 12]), torch.tensor([0, 0])))
    parents = torch.tensor([0, 1])
    _, states_2d = drafter.step(below, 2, Frontier(torch.tensor([21, 22]), parents))
    for row, branch in enumerate(([11, 21], [12, 22])):
        whole = torch.cat([tokens, torch.tensor([branch])], dim=1)
        wanted_d = drafter.read(whole)[0, -1]
        torch.testing.assert_close(states_2d[row], wanted_d, rtol=1e-4, atol=1e-4)
    state = drafter.extend(state, target.forward(tokens[:, :3]), torch.tensor([[12, 22, 30]]))
    assert state.memory.length == 6 + 3
    _, states_1d = drafter.step(state, 0, Frontier(torch.tensor([30]), ZERO))
    whole = torch.cat([tokens, torch.tensor([[12, 22, 30]])], dim=1)
    torch.testing.assert_close(states_1d[0], drafter.read(whole)[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_draft_leaves_where_it_is_sure(target: Target) -> None:
    """Threshold t: it leaves at the first exit whose largest probability is above t."""
    tokens_BT = text(target)
    features = target.forward(tokens_BT)
    drafter = sorted_lm(target)
    best_ET = [
        depth.head(depth.states_BNd).softmax(-1).amax(-1)[0]
        for depth in drafter.unroll(features, tokens_BT)
    ]
    # Half of the values lie above it, and none on it.
    values = torch.stack(best_ET[:2]).flatten().sort().values
    threshold = float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean())
    drafter = sorted_lm(target, thresholds=[threshold, threshold])
    expected = [0, 0, 0]
    for t in range(3, 18):
        state = drafter.start(features[:, :t], tokens_BT[:, : t + 1])
        _, states_1d = drafter.step(state, 0, Frontier(tokens_BT[0, t : t + 1], ZERO))
        e = next((e for e in (0, 1) if best_ET[e][t] > threshold), 2)
        expected[e] += 1
        # The head gives the logits back that the decision was made with.
        logits_1D = drafter.head(0)(states_1d)
        assert logits_1D.softmax(-1).max() == pytest.approx(float(best_ET[e][t]), rel=1e-3)
    assert drafter.exits_taken == expected
    assert min(expected) > 0


def test_one_model_for_several_targets(target: Target, tmp_path: Path) -> None:
    """Trained for one target it drafts for another with this vocabulary, and goes on there."""
    other = tiny_target(8)
    drafter = sorted_lm(target, embedding="own", head=TIED, thresholds=[0.5, 0.4])
    drafter.save_pretrained(tmp_path)
    loaded = load_drafter(tmp_path, other)
    assert isinstance(loaded, SortedLm)
    assert loaded.target is other
    assert (loaded.exits, loaded.thresholds) == ([1, 2, 4], [0.5, 0.4])
    further = sorted_lm(other, embedding="own", head=TIED)
    further.start_from(loaded)
    tokens_BT = text(target)
    assert torch.equal(further.read(tokens_BT), drafter.read(tokens_BT))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"exits": [1, 2]}, r"drafter.exits=\[1, 2\]"),
        ({"exits": [2, 1, 4]}, r"such as \[2, 4\]"),
        ({"thresholds": [0.5]}, "should be 2 probabilities"),
        ({"thresholds": [0.5, 1.5]}, "should be 2 probabilities"),
        ({"head": OWN, "num_layers": None}, "num_layers is null"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    target: Target, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        sorted_lm(target, **settings)
