"""The shadow: what a job does, with every family and loss, and what becomes of it."""

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conf.check import build
from models.drafter.causal_lm import CausalLm
from models.target import Target
from tests.train.online.tiny_stream import GREEDY, learner, medusa, prompts, serve
from train.losses import ForwardKL
from train.online.acceptance import chances, replay_rounds
from train.online.learner import Learner, Updates
from train.online.served import Served
from train.online.stream import check_window
from train.teacher import Teacher

LOSSES = sorted(
    f for f in (Path(__file__).parents[3] / "conf" / "loss").glob("*.yaml") if f.stem != "smooth_l1"
)


@pytest.fixture(scope="module")
def served(target: Target) -> list[Served]:
    return serve(target, medusa(target), prompts(target, 4, seed=0))


@pytest.mark.parametrize("file", LOSSES, ids=lambda f: f.stem)
def test_any_loss_learns_the_refused_drafts(
    target: Target, served: list[Served], file: Path
) -> None:
    """The loss of the same rows goes down, twice the same from the same seed."""
    results = []
    for _ in range(2):
        torch.manual_seed(len(results))  # whatever the random state was
        taught = learner(target, lr=2e-3, steps=6, prompts=4, replay=0.0)
        taught.loss = build(OmegaConf.load(file))
        before = copy.deepcopy(taught.serving.state_dict())
        done = taught.learn(0, served, [])
        results.append((done, taught.shadow.state_dict()))
        for name, value in taught.serving.state_dict().items():
            assert torch.equal(value, before[name]), "a job touched the drafter that serves"
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])
    done = results[0][0]
    assert done.rows == 6 * sum(len(s.error_E2) for s in served)
    if file.stem not in {"tvd", "tvd_plus_plus", "lk_lambda"}:  # flat at untrained weights
        assert done.last_loss < done.first_loss


def test_rows_and_texts_follow_the_shares(target: Target, served: list[Served]) -> None:
    draw = torch.Generator().manual_seed(0)
    half = learner(target, prompts=2, replay=0.5)
    full = [
        Served(
            s.tokens_T, s.prompt, s.first, s.final_Nd, s.layers, s.error_E2[:5], s.error_E2[5:20]
        )
        for s in served
    ]
    texts = half._pick_texts(full[:2], full[2:], draw)
    assert [any(t is f for f in full[:2]) for t in texts] == [True, False]
    chosen_M3 = half._pick_rows(texts, draw)
    assert len(chosen_M3) == 20
    assert chosen_M3[:10, 0].tolist() == [0] * 5 + [1] * 5
    assert len({tuple(row) for row in chosen_M3.tolist()}) == 20
    alone = learner(target, prompts=2, replay=0.0)
    assert len(alone._pick_rows(full[:2], draw)) == 10
    # Nothing older yet: new texts fill up.
    assert len(half._pick_texts(full, [], draw)) == 2
    # A quarter: 10 errors and 10/3 accepted.
    assert len(learner(target, replay=0.25)._pick_rows(full[:2], draw)) == 13


def test_a_small_language_model_learns_too(target: Target) -> None:
    """It reads no features: only those that are taught with are kept."""

    def made() -> CausalLm:
        torch.manual_seed(0)
        lm = CausalLm(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            target_config=target.plain_config,
            num_layers=2,
            head={"_target_": "models.head.own.OwnHead"},
        )
        lm.bind(target)
        lm.init_from(target)
        return lm

    taught = Learner(
        serving=made(),
        shadow=made(),
        candidate=made(),
        teacher=Teacher(target=target),
        loss=ForwardKL(),
        make_optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
        updates=Updates(steps=30, prompts=6, replay=0.3),
        z=1.64,
        seed=0,
    )
    asked = prompts(target, 6, seed=0)
    served = serve(target, taught.serving, asked)
    assert all(s.first == s.prompt - 1 and len(s.final_Nd) == s.answer for s in served)
    before = sum(replay_rounds(chances(taught.serving, s, GREEDY)).rounds for s in served)
    rounds = sum(len(s.error_E2) for s in served)
    assert rounds > 40
    for s in served:  # the refused drafts are refused in the training view too, and no others
        a_KJ = chances(taught.serving, s, GREEDY)
        for u, k in s.error_E2.tolist():
            assert a_KJ[k, u + 1 - s.prompt] == 0.0
        for u, k in s.accepted_A2.tolist():
            assert a_KJ[k, u + 1 - s.prompt] == 1.0
    taught.learn(0, served, [])
    decision = taught.judge(served, GREEDY)
    assert decision.what == "swapped"
    after = sum(replay_rounds(chances(taught.serving, s, GREEDY)).rounds for s in served)
    assert after < 0.8 * before
    assert torch.equal(
        taught.weights["vocab_head.linear.weight"],
        taught.serving.state_dict()["vocab_head.linear.weight"],
    )


@pytest.mark.parametrize("broken", ["noise", "nan", "equal"])
def test_a_shadow_that_is_not_better_is_not_served(
    target: Target, served: list[Served], broken: str
) -> None:
    good = learner(target, steps=40, prompts=4)
    good.learn(0, served, [])
    assert good.judge(served, GREEDY).what == "swapped"
    kept = copy.deepcopy(good.serving.state_dict())
    optimizer, lr = good.optimizer, good.lr
    with torch.no_grad():
        for p in good.shadow.parameters():
            if broken == "noise":
                p.normal_()
            elif broken == "nan":
                p.view(-1)[0] = torch.nan
    decision = good.judge(served, GREEDY)
    for name, value in good.serving.state_dict().items():
        assert torch.equal(value, kept[name])
    if broken == "equal":
        assert (decision.what, decision.compared.gain, good.lr) == ("kept", 0.0, lr)
        return
    assert (decision.what, good.lr) == ("reset", lr / 2)
    assert good.optimizer is not optimizer
    assert good.optimizer.param_groups[0]["lr"] == lr / 2
    for name, value in good.shadow.state_dict().items():
        assert torch.equal(value, kept[name])


def test_one_prompt_alone_decides_nothing(target: Target, served: list[Served]) -> None:
    taught = learner(target, steps=40, prompts=4)
    taught.learn(0, served, [])
    assert taught.judge(served[:1], GREEDY).what == "kept"


def test_the_window_holds_what_is_served_between_two_boundaries() -> None:
    check_window(4, 4)
    with pytest.raises(ValueError, match="raise window"):
        check_window(4, 3)
