from itertools import combinations
from math import prod

import pytest
import torch

from decode.tree.chain import Chain
from decode.tree.static import StaticTree, TreeShape, best_tree
from models.drafter.base import Frontier
from models.target import Target
from tests.decode.toy import echo

ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.25, 0.05], [0.3, 0.1, 0.02]]


def brute_force(accuracy: list[list[float]], nodes: int) -> float:
    """The best expected tau over every tree with this many nodes."""
    everything: list[tuple[int, ...]] = [()]
    for depth in range(len(accuracy)):
        above = [path for path in everything if len(path) == depth]
        everything += [(*path, r) for path in above for r in range(len(accuracy[depth]))]
    best = 0.0
    for chosen in combinations(everything[1:], nodes - 1):
        known = {(), *chosen}
        if all(path[:-1] in known for path in chosen):
            gains = (prod(accuracy[k][r] for k, r in enumerate(path)) for path in chosen)
            best = max(best, 1 + sum(gains))
    return best


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    "accuracy",
    [
        [[0.5, 0.3], [0.4, 0.2], [0.3, 0.1]],
        [[0.2, 0.4], [0.9, 0.05], [0.1, 0.8]],  # ranks out of order
        [[0.9, 0.05, 0.01], [0.8, 0.1, 0.05]],
    ],
)
def test_best_tree_is_the_best_of_all_trees(accuracy: list[list[float]], nodes: int) -> None:
    shape = best_tree(accuracy, nodes)
    assert shape.nodes == nodes
    assert shape.expected_tau(accuracy) == pytest.approx(brute_force(accuracy, nodes))


def test_best_tree_by_hand() -> None:
    # Products: (0)=.5 (0,0)=.2 (1)=.2 (0,1)=.125 (1)(0)=.08 (2)=.1 (0,0,0)=.06
    shape = best_tree(ACCURACY, 6)
    assert shape.paths == ((0,), (1,), (2,), (0, 0), (0, 1))
    assert shape.expected_tau(ACCURACY) == pytest.approx(1 + 0.5 + 0.2 + 0.1 + 0.2 + 0.125)
    assert shape.depth == 2


def test_best_tree_leaves_out_what_was_never_right() -> None:
    assert best_tree([[0.5, 0.0], [0.0, 0.0]], 26).paths == ((0,),)


def test_best_tree_refuses_a_tree_without_drafts() -> None:
    with pytest.raises(ValueError, match=r"tree\.nodes=1"):
        best_tree(ACCURACY, 1)


def test_levels_index_the_frontier_not_the_tree() -> None:
    shape = TreeShape(((1, 0), (0,), (1,), (2,), (2, 1), (1, 0, 0)))
    first, second, third = shape.levels
    assert first.parents_M.tolist() == [0, 0, 0]
    assert first.ranks_M.tolist() == [0, 1, 2]
    assert first.expand_M.tolist() == [False, True, True]
    assert second.parents_M.tolist() == [0, 1]  # among the extended nodes (1,) and (2,)
    assert second.ranks_M.tolist() == [0, 1]
    assert second.expand_M.tolist() == [True, False]
    assert (third.parents_M.tolist(), third.ranks_M.tolist()) == ([0], [0])


@torch.no_grad()
def test_static_tree_takes_the_ranked_tokens_of_each_parent(target: Target) -> None:
    drafter = echo(target, draft_vocab_size=100)
    policy = StaticTree(nodes=6, accuracy_KR=ACCURACY)
    assert policy.name == "tree6"
    prompt = torch.tensor([[5, 9, 17]])
    state = drafter.start(target.forward(prompt[:, :2]), prompt)
    tree = drafter.propose(state, prompt[0, -1:], policy)
    assert tree.parents_N.tolist() == [-1, 0, 0, 0, 1, 1]
    assert tree.depths_N.tolist() == [0, 1, 1, 1, 2, 2]
    assert tree.q_NV is None
    for node in range(1, len(tree)):
        path, at = [], int(tree.parents_N[node])
        while at > 0:
            path.insert(0, int(tree.tokens_N[at]))
            at = int(tree.parents_N[at])
        text = torch.cat([prompt, torch.tensor([path], dtype=torch.long)], dim=1)
        logits_V = target.project(target.forward(text).final_BTd[0, -1])[:100]
        rank = (0, 1, 2, 0, 1)[node - 1]
        assert int(tree.tokens_N[node]) == int(logits_V.topk(3).indices[rank])


@torch.no_grad()
def test_chain_keeps_the_distribution_it_drew_from(target: Target) -> None:
    drafter = echo(target, draft_vocab_size=50)
    prompt = torch.tensor([[5, 9, 17]])
    state = drafter.start(target.forward(prompt[:, :2]), prompt)
    tree = drafter.propose(state, prompt[0, -1:], Chain(gamma=3, temperature=0.7, seed=1))
    assert tree.parents_N.tolist() == [-1, 0, 1, 2]
    assert tree.q_NV is not None
    assert tree.q_NV.shape == (4, target.vocab_size)
    assert torch.allclose(tree.q_NV[1:].sum(-1), torch.ones(3))
    assert float(tree.q_NV[1:, 50:].sum()) == 0.0
    for node in (1, 2, 3):
        assert tree.draws_N[node] == tree.q_NV[node, tree.tokens_N[node]]
    logits_V = target.project(target.forward(prompt).final_BTd[0, -1])[:50]
    assert torch.allclose(tree.q_NV[1, :50], (logits_V / 0.7).softmax(-1), atol=1e-6)


def test_chain_at_temperature_zero_is_the_argmax_and_has_no_q(target: Target) -> None:
    drafter = echo(target)
    logits = torch.randn(1, target.vocab_size)
    children = Chain(gamma=1).grow(
        0, Frontier(torch.tensor([3]), torch.tensor([0])), logits, drafter
    )
    assert children is not None
    assert children.tokens_M.tolist() == [int(logits.argmax())]
    assert children.q_MV is None
    assert children.expand_M.tolist() == [False]


def test_chain_refuses_more_drafts_than_the_drafter_makes() -> None:
    from models.drafter.medusa import Medusa

    head = {"_target_": "models.head.own.OwnHead"}
    drafter = Medusa(hidden_size=4, vocab_size=9, num_heads=2, head=head)
    frontier = Frontier(torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"tree\.gamma=3 .* at most 2"):
        Chain(gamma=3).grow(0, frontier, torch.randn(1, 9), drafter)
    with pytest.raises(ValueError, match="3 depths"):
        StaticTree(nodes=20, accuracy_KR=ACCURACY).grow(0, frontier, torch.randn(1, 9), drafter)


def test_static_tree_without_accuracies_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"rank_accuracy\.json"):
        StaticTree(nodes=26, accuracy_KR=None)
