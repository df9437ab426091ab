"""Ending drafts early: where, and that the output keeps the target's law.

Shape legend: V vocabulary.
"""

import pytest
import torch
from torch import Tensor

from decode.session import Decoder
from decode.stop.base import Stop
from decode.stop.confidence import Confidence
from decode.tree import chain
from decode.tree.chain import Chain
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from models.drafter.base import Tree
from models.target import Target
from tests.decode.enumerated import TableDrafter, texts_of
from tests.decode.stop.told import Told
from tests.decode.toy import Scripted, echo, law_error, outcomes, tables

V, GAMMA = 3, 3


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws in double precision, so that they agree to 1e-12."""
    monkeypatch.setattr(chain, "probabilities", lambda logits, **_: logits.softmax(-1))


def drafted(q: dict[tuple, Tensor], chance: Scripted, stop: Stop | None) -> Tree:
    policy = Chain(gamma=GAMMA, temperature=1.0, stop=stop)
    policy._chance = chance  # type: ignore[assignment]
    return TableDrafter(q).propose(None, torch.tensor([0]), policy)


def produced(tree: Tree, p: dict[tuple, Tensor], chance: Scripted) -> tuple:
    texts = texts_of(tree)
    verdict = Sampling().verify(tree, lambda node: p[texts[node]], chance)
    return (*texts[verdict.path[-1]], verdict.token)


def test_rows_below_the_threshold_end() -> None:
    rule = Confidence(threshold=0.6)
    assert [rule.ends(Told(best=best)) for best in (0.59, 0.61, 0.8)] == [True, False, False]
    assert rule.name == "confidence0.6"


@pytest.mark.parametrize(("threshold", "found"), [(0.6, {2, 3}), (0.7, {1})])
def test_the_uncertain_token_is_drafted_and_nothing_behind_it(
    threshold: float, found: set[int]
) -> None:
    q, lengths = tables(2, V, GAMMA, sharpness=2.0), set()
    for tree, _ in outcomes(lambda chance: drafted(q, chance, Confidence(threshold=threshold))):
        path = tuple(tree.tokens_N[1:].tolist())
        sure = [float(q[path[:k]].max()) >= threshold for k in range(len(path))]
        assert all(sure[:-1])
        assert len(path) == GAMMA or not sure[-1]
        lengths.add(len(path))
    assert lengths == found  # the first row of q has a largest probability of 0.65


@pytest.mark.parametrize("threshold", [0.45, 0.6, 0.8])
@pytest.mark.parametrize("seed", [2, 3])
def test_the_law_of_the_output_is_the_targets(seed: int, threshold: float) -> None:
    p, q = tables(1, V, GAMMA), tables(seed, V, GAMMA, sharpness=2.0)

    def round_(chance: Scripted) -> tuple:
        return produced(drafted(q, chance, Confidence(threshold=threshold)), p, chance)

    assert law_error(p, V, GAMMA + 1, round_) < 1e-12


def test_control_leaving_out_a_token_for_what_it_is_changes_the_law() -> None:
    """The draft ends before a drawn token of little q, which is what `Stop` cannot express."""
    p, q = tables(1, V, GAMMA), tables(2, V, GAMMA, sharpness=2.0)

    def round_(chance: Scripted) -> tuple:
        tree = drafted(q, chance, None)
        keep = 1
        while keep < len(tree) and float(tree.draws_N[keep]) >= 0.6:
            keep += 1
        return produced(tree.keep(torch.arange(keep)), p, chance)

    assert law_error(p, V, GAMMA + 1, round_) > 1e-2


def test_the_toy_example_of_the_bias() -> None:
    """p = q = (0.7, 0.3): the second token left out whenever it is drawn."""
    p = {(): torch.tensor([0.7, 0.3]), (0,): torch.ones(2) / 2, (1,): torch.ones(2) / 2}

    def round_(chance: Scripted) -> int:
        if chance.draw(p[()]) == 0:
            return 0
        return chance.draw(p[()])  # no draft: the bonus token

    first = sum(weight for token, weight in outcomes(round_) if token == 0)
    assert first == pytest.approx(0.7 + 0.3 * 0.7)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_greedy_tokens_do_not_depend_on_the_rule(target: Target, noise: float) -> None:
    plain = Decoder(target=target, drafter=None, verifier=Greedy(), policy=None)
    prompt, drafter = [5, 9, 17, 30], echo(target, noise=noise)
    truth = plain.generate(prompt, max_new_tokens=24, stop_at_eos=False)
    policy = Chain(gamma=5, stop=Confidence(threshold=0.7))
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=policy)
    made = decoder.generate(prompt, max_new_tokens=24, stop_at_eos=False)
    assert made.tokens == truth.tokens
    assert policy.name == "chain5-confidence0.7"
    lengths = {r.depth for r in made.rounds}
    assert lengths - {5}, "no draft ended early"
    assert min(lengths) >= 1


def test_a_threshold_that_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop\.threshold=60"):
        Confidence(threshold=60)
