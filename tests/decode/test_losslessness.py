"""Greedy answers with a drafter beside plain ones: equal, or what differs and by how much."""

from dataclasses import replace

import pytest
import torch

from decode.losslessness import Comparison, first_difference
from decode.measure import measure
from decode.tree.chain import Chain
from decode.tree.static import StaticTree
from decode.verifier.greedy import Greedy
from models.target import Target
from tests.decode.test_measure import PROMPT_SET
from tests.decode.toy import echo


@pytest.mark.parametrize(
    "policy", [Chain(gamma=3), StaticTree(nodes=8, accuracy_KR=[[0.4, 0.3], [0.4, 0.2]])]
)
def test_greedy_answers_are_compared_in_the_same_run(target: Target, policy) -> None:
    compared = _compare(target, Greedy(), policy, noise=0.7)
    assert (compared.prompts, compared.identical, compared.differences) == (4, 4, [])
    assert "4 of 4 greedy answers (64 tokens, float32) are identical" in compared.sentence()


def test_the_comparison_finds_a_wrong_verifier(target: Target) -> None:
    class Trusting(Greedy):
        def verify(self, tree, p, chance):
            verdict = super().verify(tree, p, chance)
            if len(tree) > 1 and len(verdict.path) == 1:
                return replace(verdict, path=[0, 1])
            return verdict

    compared = _compare(target, Trusting(), Chain(gamma=2), noise=50.0)
    assert compared.identical == 0
    for found in compared.differences:
        assert found.plain_rank == 0
        assert found.drafted_rank > 0
        assert found.gap > 10 * found.step


def _compare(target: Target, verifier: Greedy, policy, noise: float) -> Comparison:
    compared = measure(
        target=target,
        drafter=echo(target, noise=noise),
        policy=policy,
        verifier=verifier,
        prompts=PROMPT_SET,
        max_new_tokens=16,
    ).lossless
    assert compared is not None
    return compared


def test_the_gap_is_read_where_the_answers_part(target: Target) -> None:
    prompt = PROMPT_SET[0]
    text = torch.tensor([[*prompt.tokens, 11, 12]])
    logits_V = target.project(target.forward(text).final_BTd[0, -1])
    best, second = logits_V.topk(2).indices.tolist()
    found = first_difference(target, prompt, [11, 12, second, 4], [11, 12, best, 9])
    assert (found.position, found.plain_rank, found.drafted_rank) == (2, 0, 1)
    assert found.gap == pytest.approx(float(logits_V[best] - logits_V[second]))
    assert found.step == torch.finfo(torch.float32).eps * 2.0 ** int(logits_V[best].abs().log2())
