"""The MLP speculator's own maths; the contract tests cover the rest."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models.drafter.base import Frontier
from models.drafter.mlp_speculator import MlpSpeculator
from models.target import Target

HEAD = {"_target_": "models.head.own.OwnHead"}


def _speculator(target: Target, **changes: Any) -> MlpSpeculator:
    torch.manual_seed(0)
    given: dict[str, Any] = {"head": HEAD} | changes
    drafter = MlpSpeculator(hidden_size=target.hidden_size, vocab_size=target.vocab_size, **given)
    drafter.bind(target).init_from(target)
    for norm in drafter.norms.parameters():
        norm.data.add_(0.3 * torch.randn_like(norm))
    return drafter.eval()


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_states_follow_the_recurrence(target: Target, tied: bool, scaled: bool) -> None:
    """s_k = GELU(norm(P_k s_{k-1} + beta E_k(x_{t+1+k}))), written out for one position."""
    drafter = _speculator(target, n_predict=3, inner_dim=24, tie_weights=tied, scale_input=scaled)
    weights = dict(drafter.named_parameters())
    tokens = torch.randint(3, target.vocab_size, (1, 9))
    features = target.forward(tokens)
    t = 4
    state = features.final_BTd[0, t]
    if scaled:
        state = _rms(state) / math.sqrt(2)
    sigma = 0.5 ** (0.5 / 3)
    beta = math.sqrt((1 - sigma**2) * 24 / 2) / sigma
    for k, depth in enumerate(drafter.unroll(features, tokens)):
        shared = 0 if tied else k
        projection = weights[f"projections.{min(k, 1) if tied else k}.weight"]
        embedded = weights[f"embeddings.{shared}.weight"][tokens[0, t + 1 + k]]
        z = _rms(projection @ state + beta * embedded)
        state = F.gelu(weights[f"norms.{shared}.weight"] * z + weights[f"norms.{shared}.bias"])
        torch.testing.assert_close(depth.states_BNd[0, t], state, rtol=1e-5, atol=1e-5)
        logits = weights[f"heads.{shared}.linear.weight"] @ state
        torch.testing.assert_close(depth.head(depth.states_BNd[0, t]), logits)
        assert depth.shift == 1 + k


def test_the_feature_keeps_half_of_the_last_state() -> None:
    """Each step multiplies the share of the old state by s^2 = 0.5^(1/n): 0.5 after n steps."""
    drafter = MlpSpeculator(hidden_size=32, vocab_size=50, n_predict=4, head=HEAD)
    # A token's embedding has variance 1/D, so beta^2 / D beside the state's 1/2.
    token = drafter.beta**2 / 32
    share = 0.5 / (0.5 + token)
    assert share**4 == pytest.approx(0.5)
    assert drafter.beta == pytest.approx(1.7399, abs=1e-4)


@pytest.mark.parametrize(("tied", "n"), [(True, 1), (True, 4), (False, 3)])
def test_parameter_count(tied: bool, n: int) -> None:
    """Tied 2VD + dD + D^2 + 2D, else n 2VD + dD + (n-1) D^2 + 2nD."""
    d, D, V = 32, 24, 50
    drafter = MlpSpeculator(
        hidden_size=d, vocab_size=V, n_predict=n, inner_dim=D, tie_weights=tied, head=HEAD
    )
    own = 1 if tied else n
    expected = own * (2 * V * D + 2 * D) + d * D + min(own, n - 1) * D * D
    assert sum(p.numel() for p in drafter.parameters()) == expected


def test_matrices_start_with_a_spread_of_one_over_the_width(target: Target) -> None:
    drafter = _speculator(target, inner_dim=64)
    for name, weight in drafter.named_parameters():
        if weight.dim() == 2:
            assert float(weight.detach().std()) == pytest.approx(1 / 8, rel=0.05), name


def test_started_from_the_target(target: Target) -> None:
    """The embedding has the target's directions and the published spread, the head its rows."""
    drafter = _speculator(target, init="target", draft_vocab_size=40)
    weights = dict(drafter.named_parameters())
    embedding = weights["embeddings.0.weight"]
    assert embedding.shape == (target.vocab_size, 32)  # every token is read, 40 are drafted
    assert float(embedding.detach().std()) == pytest.approx(32**-0.5, rel=1e-4)
    theirs = target.embedding_weight_Vd
    scale = float(embedding.detach().norm() / theirs.norm())
    torch.testing.assert_close(embedding, scale * theirs)
    assert torch.equal(weights["heads.0.linear.weight"], target.head_weight_Vd[:40])


def test_a_nodes_state_is_that_of_its_own_path(target: Target) -> None:
    """Cousins with one token: their states differ because their parents' do."""
    drafter = _speculator(target, n_predict=3)
    tokens = torch.randint(3, target.vocab_size, (1, 6))
    state = drafter.start(target.forward(tokens)[:, :5], tokens)
    zero = torch.zeros(1, dtype=torch.long)
    state, _ = drafter.step(state, 0, Frontier(tokens[0, 5:], zero))
    state, _ = drafter.step(state, 1, Frontier(torch.tensor([7, 8]), zero.expand(2)))
    _, both = drafter.step(state, 2, Frontier(torch.tensor([9, 9]), torch.tensor([0, 1])))
    assert not torch.allclose(both[0], both[1], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "target"}, "init=target copies"),
        ({"head": {"_target_": "models.head.frozen.FrozenHead"}}, "head=frozen is the target's"),
    ],
)
def test_another_width_cannot_borrow(target: Target, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _speculator(target, inner_dim=24, **changes)
