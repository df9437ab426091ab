"""Drafts from every position of recorded answers: greedy they are the decoder's, sampled they have
its law."""

import numpy as np
import pytest
import torch

from decode.answers import Recorded, record
from decode.chance import SeededChance
from decode.prompts import Prompt
from decode.rounds import acceptance
from decode.trace import SIGNALS, Shadow, trace
from decode.tree.chain import Chain
from decode.walk import walk
from models.acceptance import AcceptanceHead
from models.drafter.base import Frontier
from models.drafter.causal_lm import CausalLm
from models.target import Target
from tests.decode.toy import PROMPTS, echo


def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", tokens, "") for i, tokens in enumerate(PROMPTS)]


@pytest.fixture(autouse=True)
def cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))


def answers(target: Target, temperature: float, length: int = 24) -> list[Recorded]:
    return record(
        target, prompts(), bench="toy", max_new_tokens=length, temperature=temperature
    ).answers


def test_greedy_rounds_are_those_of_a_walk(target: Target) -> None:
    drafter, made = echo(target, noise=0.6), answers(target, 0.0)
    found = trace(target, drafter, made, gamma=4, temperature=0.0, max_new_tokens=24)
    for answer, walked in zip(made, found.walked, strict=True):
        i, rounds = 1, walk(target, drafter, Chain(gamma=4), answer, max_new_tokens=24)
        for round_ in rounds:
            at = i - 1
            assert walked.starts_I[at] == i
            assert walked.accepted_I[at] == round_.accepted
            # A walk does not count what follows the end of an answer as tested.
            assert walked.tested_I[at] == round_.tested
            i += round_.accepted + int(not walked.ends_I[at])


def test_numbers_of_a_row(target: Target) -> None:
    drafter, made = echo(target, noise=0.6), answers(target, 0.0)
    torch.manual_seed(0)
    head = AcceptanceHead(state_size=32, embedding_size=32, reads="drawn")
    drafter.set_acceptance(head)
    found = trace(target, drafter, made[:1], gamma=2, temperature=0.0, max_new_tokens=3)
    root = torch.tensor(made[0].text[: len(made[0].prompt.tokens) + 1])
    state = drafter.start(target.forward(root[None, :-1]), root[None])
    _, states_1d = drafter.step(state, 0, _root(root))
    logq_D = drafter.head(0)(states_1d)[0].log_softmax(-1)
    row = dict(zip(SIGNALS, found.walked[0].signals_IKS[0, 0], strict=True))
    assert row["best"] == row["drawn"] == pytest.approx(float(logq_D.max().exp()))
    assert row["entropy"] == pytest.approx(float(-(logq_D.exp() * logq_D).sum()), rel=1e-5)
    best_1 = logq_D.argmax(-1)[None]
    expected = head.judged(states_1d, logq_ND=logq_D[None], drafted_N=best_1, drafter=drafter)
    assert row["judged"] == pytest.approx(float(expected[0]), abs=1e-5)
    assert row["truth"] == float(found.walked[0].accepted_I[0] > 0)


def _root(tokens: torch.Tensor) -> Frontier:
    return Frontier(tokens[-1:], torch.zeros(1, dtype=torch.long))


def test_sampled_drafts_are_accepted_as_often_as_a_decoder_accepts(target: Target) -> None:
    drafter = CausalLm(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_config=target.plain_config,
        num_layers=3,
        head={"_target_": "models.head.frozen.FrozenHead"},
    ).bind(target)
    drafter.init_from(target)
    drafter.eval()
    recording = record(
        target, prompts(), bench="toy", max_new_tokens=40, temperature=1.0, samples=4
    )
    chance_KAJ = acceptance(target, drafter, recording, depths=1, draft_temperature=1.0)
    found = trace(target, drafter, recording.answers, gamma=1, temperature=1.0, max_new_tokens=40)
    said, came = [], []
    for a, walked in enumerate(found.walked):
        said += [chance_KAJ[0, a, i] for i in walked.starts_I]
        came += (walked.accepted_I > 0).tolist()
    assert len(came) > 300
    spread = 4 * (np.mean(said) * (1 - np.mean(said)) / len(said)) ** 0.5
    assert np.mean(came) == pytest.approx(np.mean(said), abs=float(spread))


class Given:
    """A drafter whose row is given, over a reduced vocabulary or the whole one."""

    acceptance = None

    def __init__(self, ids_D: torch.Tensor | None) -> None:
        self.draft_ids_D = ids_D

    def to_target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.draft_ids_D is None else self.draft_ids_D[ids]


@pytest.mark.parametrize("reduced", [False, True])
def test_drafts_and_answers_are_drawn_jointly(reduced: bool) -> None:
    """Over answers y ~ p the draft has law q, and is accepted with sum min(p, q)."""
    p_V = torch.tensor([0.5, 0.3, 0.2])
    ids_D = torch.tensor([0, 2]) if reduced else None
    q_D = torch.tensor([0.2, 0.8]) if reduced else torch.tensor([0.1, 0.6, 0.3])
    full_V = torch.tensor([0.2, 0.0, 0.8]) if reduced else q_D
    drafter: object = Given(ids_D)
    chance, draws = SeededChance(seed=1), 4000
    drafted, accepted, truth = torch.zeros(3), 0, 0.0
    for _ in range(draws):
        y = chance.draw(p_V)
        shadow = Shadow(gamma=1, temperature=1.0, coming=[y], p=lambda _: p_V, chance=chance)
        children = shadow.grow(0, None, q_D.log()[None], drafter)  # type: ignore[arg-type]
        assert children is not None
        token = int(children.tokens_M[0])
        assert (token == y) or not shadow.accepted
        drafted[token] += 1
        accepted += shadow.accepted
        assert shadow.truth == pytest.approx(min(1.0, float(p_V[token] / full_V[token])))
        truth += shadow.truth
    assert torch.allclose(drafted / draws, full_V, atol=0.03)
    assert truth / draws == pytest.approx(accepted / draws, abs=0.02)
    assert accepted / draws == pytest.approx(float(torch.minimum(full_V, p_V).sum()), abs=0.03)
