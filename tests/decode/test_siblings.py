"""The figure of the root's siblings: the rule's chance by enumeration, and in a measurement."""

import pytest
import torch

from decode.measure import measure
from decode.optimal import optimal_acceptance
from decode.prompts import Prompt
from decode.report import table
from decode.siblings import SiblingWatch, acceptance
from decode.tree.chain import Chain
from decode.tree.sampled import Sampled
from decode.verifier.base import Verifier
from decode.verifier.sampling import Sampling
from decode.verifier.spectr import SpecTr
from decode.verifier.traversal import Traversal
from models.target import Target
from tests.decode.enumerated import grown, mean_accepted, texts_law
from tests.decode.toy import PROMPTS, echo, outcomes, tables


@pytest.mark.parametrize(
    ("rule", "replacement"),
    [(Sampling(), False), (Sampling(), True), (SpecTr(), True), (Traversal(), False)],
)
def test_the_chance_of_a_rule_is_that_of_its_enumeration(rule: Verifier, replacement: bool) -> None:
    p, q = tables(61, 4, 1), tables(62, 4, 1)
    whole = mean_accepted(texts_law(p, q, [2], rule, replacement=replacement))
    trees = outcomes(lambda chance: grown(q, chance, [2], replacement=replacement, label=None))
    ours = sum(acceptance(rule, tree, p[()]) * weight for tree, weight in trees)
    assert ours == pytest.approx(whole, abs=1e-12)
    if replacement:
        assert ours < optimal_acceptance(p[()], q[()], 2)


def test_a_watch_changes_no_verdict_and_looks_at_every_fourth_round() -> None:
    p, q = tables(63, 4, 2), tables(64, 4, 2)
    watch = SiblingWatch(Sampling())
    assert texts_law(p, q, [2], watch, replacement=False) == texts_law(
        p, q, [2], Sampling(), replacement=False
    )
    watch.take(discard=True)
    assert watch.result() is None
    tree = next(outcomes(lambda c: grown(q, c, [2, 1], replacement=False, label=None)))[0]
    laws = [p[()], *[p[(0,)]] * (len(tree) - 1)]
    for rounds in (5, 3):
        for _ in range(rounds):
            assert watch.verify(tree, lambda node: laws[node], _Heads()).path[1] == 1
        watch.take()
    found = watch.result()
    assert found is not None
    assert (found.rounds, found.replacement) == (3, False)
    # 48 sets of siblings; the chance given one set deviates by at most 0.5 from the mean.
    whole = mean_accepted(texts_law(p, q, [2], Sampling(), replacement=False))
    assert found.rule.value == pytest.approx(whole, abs=0.15)
    assert whole < found.optimum.value


class _Heads:
    def coin(self, probability: float) -> bool:
        return True

    def draw(self, p_V: torch.Tensor) -> int:
        return 0


@pytest.mark.parametrize("rule", [SpecTr(), Sampling(), Traversal()])
def test_a_measurement_reports_it(target: Target, rule: Verifier) -> None:
    replacement = isinstance(rule, SpecTr)
    policy = Sampled(widths=[3, 2], replacement=replacement, temperature=1.5, seed=4)
    made = measure(
        target=target,
        drafter=echo(target, noise=1.0),
        policy=policy,
        verifier=rule,
        prompts=[Prompt(str(i), tokens, "") for i, tokens in enumerate(PROMPTS)],
        max_new_tokens=16,
        temperature=1.5,
        baseline=False,
    )
    assert made.siblings is not None
    assert made.siblings.rounds >= len(PROMPTS)
    assert made.siblings.replacement == replacement
    assert made.siblings.rule.value > 0.1
    if replacement:
        assert made.siblings.rule.value < made.siblings.optimum.value + 0.05
    rows = [list(column.cells) for column in table(made, title="").columns]
    place = rows[0].index("accepted at once")
    assert rows[1][place] == str(made.siblings.rule)
    assert str(made.siblings.optimum) in str(rows[2][place])
    assert ("at most" in str(rows[2][place])) == (not replacement)
    assert made.as_dict()["siblings"]["rule"]["value"] == made.siblings.rule.value


def test_a_chain_has_no_siblings(target: Target) -> None:
    made = measure(
        target=target,
        drafter=echo(target, noise=1.0),
        policy=Chain(gamma=2, temperature=1.0),
        verifier=Sampling(),
        prompts=[Prompt("a", PROMPTS[0], "")],
        max_new_tokens=6,
        temperature=1.0,
        baseline=False,
    )
    assert made.siblings is None
