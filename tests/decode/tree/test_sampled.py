"""Sampled trees: what is drawn, and that verification keeps the law whatever is drawn."""

import pytest
import torch
from torch import Tensor

from decode.tree.sampled import Sampled
from decode.verifier import sampling
from decode.verifier.base import check_draws
from decode.verifier.sampling import Sampling
from models.drafter.base import Frontier, Tree
from models.drafter.medusa import Medusa
from models.target import Target
from tests.decode.enumerated import error_of, grown, mean_accepted, texts_law, texts_of
from tests.decode.toy import PROMPTS, echo, outcomes, tables

V = 3


@pytest.mark.parametrize("widths", [[1], [2], [3], [4], [2, 2], [1, 3], [1, 2, 1]])
@pytest.mark.parametrize("replacement", [False, True])
def test_sampling_keeps_the_law(widths: list[int], replacement: bool) -> None:
    p, q = tables(11, V, len(widths)), tables(12, V, len(widths))
    law = texts_law(p, q, widths, Sampling(), replacement=replacement)
    assert error_of(p, len(widths) + 1, law) < 1e-12
    assert mean_accepted(law) > 0.3


def test_a_larger_vocabulary_and_a_draft_with_zeros_keep_the_law() -> None:
    """One id has no draft mass, and one has no target mass."""
    p, q = tables(13, 5, 1), tables(14, 5, 1)
    p[()], q[()] = p[()].clone(), q[()].clone()
    p[()][1] = q[()][3] = 0.0
    p[()] /= p[()].sum()
    q[()] /= q[()].sum()
    for replacement in (False, True):
        law = texts_law(p, q, [3], Sampling(), replacement=replacement)
        assert error_of(p, 2, law) < 1e-12


def test_siblings_without_replacement_have_the_law_of_gumbel_top_k() -> None:
    """P(x_1 = a, x_2 = b) = q(a) q(b) / (1 - q(a)), and the rows are those laws."""
    q = tables(15, 4, 1)
    q_V = q[()]

    def pair(chance) -> tuple[int, int]:
        tree = grown(q, chance, [2], replacement=False, label=None)
        assert tree.q_NV is not None
        assert not tree.replacement
        a, b = tree.tokens_N[1:].tolist()
        left_V = q_V.clone()
        left_V[a] = 0.0
        assert torch.allclose(tree.q_NV[1], q_V, atol=1e-15)
        assert torch.allclose(tree.q_NV[2], left_V / left_V.sum(), atol=1e-15)
        assert tree.draws_N[1:].tolist() == [float(tree.q_NV[1, a]), float(tree.q_NV[2, b])]
        return a, b

    found = dict.fromkeys([(a, b) for a in range(4) for b in range(4)], 0.0)
    for drawn, probability in outcomes(pair):
        found[drawn] += probability
    for (a, b), probability in found.items():
        exact = 0.0 if a == b else float(q_V[a] * q_V[b] / (1.0 - q_V[a]))
        assert probability == pytest.approx(exact, abs=1e-14)


def test_seeded_draws_have_the_frequencies_of_q() -> None:
    q_V = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    logits_ND = q_V.log().expand(40, 5)
    frontier = Frontier(torch.zeros(40, dtype=torch.long), torch.zeros(40, dtype=torch.long))
    drafter = Medusa(
        hidden_size=4, vocab_size=5, num_heads=2, head={"_target_": "models.head.own.OwnHead"}
    )
    policy = Sampled(widths=[2], temperature=1.0, seed=3)
    counts_VV = torch.zeros(5, 5)
    for _ in range(200):
        children = policy.grow(0, frontier, logits_ND, drafter)
        assert children is not None
        first, second = children.tokens_M.view(40, 2).T
        counts_VV.index_put_((first, second), torch.ones(40), accumulate=True)
    exact_VV = q_V[:, None] * q_V[None, :] / (1.0 - q_V)[:, None]
    exact_VV.fill_diagonal_(0.0)
    # 8,000 pairs: 4 standard deviations of a cell of probability 0.3 are 0.0205.
    assert float((counts_VV / 8000 - exact_VV).abs().max()) < 0.0205
    assert float(counts_VV[4].sum() + counts_VV[:, 4].sum() + counts_VV.diagonal().sum()) == 0.0


def test_a_token_drawn_again_is_a_leaf() -> None:
    q = tables(16, V, 2)

    def shape(chance) -> None:
        tree = grown(q, chance, [3, 1], replacement=True, label=None)
        texts, parents = texts_of(tree), tree.parents_N.tolist()
        drawn = texts[1:4]
        for node in (1, 2, 3):
            first = texts[node] not in drawn[: node - 1]
            assert parents.count(node) == int(first)
        assert len(tree) == 4 + len(set(drawn))

    assert len(list(outcomes(shape))) > 27


def test_a_nucleus_that_runs_out_gives_fewer_siblings() -> None:
    q_ND = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    frontier = Frontier(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    drafter = Medusa(
        hidden_size=4, vocab_size=4, num_heads=2, head={"_target_": "models.head.own.OwnHead"}
    )
    policy = Sampled(widths=[3, 1], temperature=1.0)
    children = policy.grow(0, frontier, q_ND.log(), drafter)
    assert children is not None
    assert children.q_MV is not None
    assert children.parents_M.tolist() == [0, 0, 1, 1, 1, 2]
    assert bool(children.expand_M.all())
    assert sorted(children.tokens_M[:2].tolist()) == [0, 1]
    assert children.tokens_M[5] == 2
    assert torch.allclose(children.q_MV.sum(-1), torch.ones(6))
    assert torch.equal(children.q_MV[[0, 2, 5]], q_ND)
    assert children.draws_M[1] == 1.0  # only one id was left


@pytest.mark.parametrize("replacement", [False, True])
def test_at_temperature_zero_it_is_the_best_tokens(target: Target, replacement: bool) -> None:
    drafter = echo(target, draft_vocab_size=100)
    prompt = torch.tensor([PROMPTS[0]])
    state = drafter.start(target.forward(prompt[:, :-1]), prompt)
    tree = drafter.propose(state, prompt[0, -1:], Sampled(widths=[3, 2], replacement=replacement))
    assert tree.q_NV is None
    chain, whole = [-1, 0, 1], [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert tree.parents_N.tolist() == (chain if replacement else whole)
    logits_V = target.project(target.forward(prompt).final_BTd[0, -1])[:100]
    count = 1 if replacement else 3
    assert tree.tokens_N[1 : 1 + count].tolist() == logits_V.topk(count).indices.tolist()


@pytest.mark.parametrize("replacement", [False, True])
def test_rows_are_over_the_vocabulary_of_the_target(target: Target, replacement: bool) -> None:
    drafter = echo(target, draft_vocab_size=50)
    prompt = torch.tensor([PROMPTS[0]])
    state = drafter.start(target.forward(prompt[:, :-1]), prompt)
    policy = Sampled(widths=[3, 2], replacement=replacement, temperature=0.8, top_p=0.9, seed=2)
    tree = drafter.propose(state, prompt[0, -1:], policy)
    assert tree.q_NV is not None
    assert tree.q_NV.shape == (len(tree), target.vocab_size)
    assert float(tree.q_NV[:, 50:].sum()) == 0.0
    assert torch.allclose(tree.q_NV[1:].sum(-1), torch.ones(len(tree) - 1))
    at = tree.q_NV[torch.arange(len(tree)), tree.tokens_N]
    assert torch.equal(tree.draws_N[1:], at[1:])
    assert tree.replacement == replacement
    check_draws(tree)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_tree_that_is_labelled_wrongly_is_refused(replacement: bool) -> None:
    p, q = tables(17, V, 1), tables(18, V, 1)
    with pytest.raises(AssertionError, match=f"replacement={not replacement}"):
        texts_law(p, q, [2], Sampling(), replacement=replacement, label=not replacement)


def test_control_rows_of_other_draws_do_not_keep_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings drawn without replacement, verified as if independent, and the other way round."""
    p, q = tables(17, V, 1), tables(18, V, 1)

    def other_rows(tree: Tree) -> Tensor:
        assert tree.q_NV is not None
        rows_NV = tree.q_NV.clone()
        if tree.replacement:
            first = tree.tokens_N[1]
            if first != tree.tokens_N[2]:
                rows_NV[2, first] = 0.0
                rows_NV[2] /= rows_NV[2].sum()
        else:
            rows_NV[2] = rows_NV[1]
        return rows_NV

    class Mistaken(Sampling):
        def verify(self, tree, p, chance):
            wrong = Tree(
                tree.tokens_N, tree.parents_N, tree.depths_N, tree.draws_N, other_rows(tree)
            )
            return super().verify(wrong, p, chance)

    monkeypatch.setattr(sampling, "check_draws", lambda tree: None)
    for replacement in (False, True):
        assert error_of(p, 2, texts_law(p, q, [2], Mistaken(), replacement=replacement)) > 1e-3


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"tree\.widths=\[\]"):
        Sampled(widths=[])
    with pytest.raises(ValueError, match=r"tree\.widths=\[2, 0\]"):
        Sampled(widths=[2, 0])
    drafter = Medusa(
        hidden_size=4, vocab_size=9, num_heads=2, head={"_target_": "models.head.own.OwnHead"}
    )
    frontier = Frontier(torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(ValueError, match="3 depths"):
        Sampled(widths=[2, 1, 1]).grow(0, frontier, torch.randn(1, 9), drafter)
