import torch

from decode.baselines.token_recycling import TokenRecycling
from decode.session import Decoder
from decode.verifier.greedy import Greedy
from models.target import Target
from models.tree import Tree
from tests.decode.toy import PROMPTS


def path_tokens(tree: Tree, node: int) -> list[int]:
    tokens = []
    while node > 0:
        tokens.append(int(tree.tokens_N[node]))
        node = int(tree.parents_N[node])
    return tokens[::-1]


def test_the_tree_walks_the_matrix(target: Target) -> None:
    recycling = TokenRecycling(nodes=81, depth=6, successors=8)
    recycling.bind(target)
    assert recycling.shape.nodes == 81
    assert [len(level.ranks_M) for level in recycling.shape.levels] == [8, 23, 25, 17, 6, 1]
    successors = torch.randint(0, target.vocab_size, (target.vocab_size, 8), dtype=torch.int32)
    recycling._matrix_VK.copy_(successors)
    tree = recycling.propose(None, torch.tensor([17]))
    assert len(tree) == 81
    assert tree.q_NV is None
    drafted = [path_tokens(tree, node) for node in range(1, 81)]
    expected = []
    for path in recycling.shape.paths:
        tokens = [17]
        for rank in path:
            tokens.append(int(successors[tokens[-1], rank]))
        expected.append(tokens[1:])
    assert drafted == expected
    assert tree.depths_N[1:].tolist() == [len(path) for path in recycling.shape.paths]


def test_unknown_tokens_have_no_children(target: Target) -> None:
    recycling = TokenRecycling(nodes=30, depth=3, successors=3)
    recycling.bind(target)
    root = torch.tensor([5])
    assert recycling.propose(None, root).tokens_N.tolist() == [5]
    recycling._matrix_VK[5] = torch.tensor([7, 8, 9])
    recycling._matrix_VK[8] = torch.tensor([5, 0, 7])
    tree = recycling.propose(None, root)
    paths = sorted(path_tokens(tree, node) for node in range(1, len(tree)))
    assert [p for p in paths if len(p) == 1] == [[7], [8], [9]]
    below = [p for p in paths if len(p) == 2]
    assert below
    assert all(p[0] == 8 for p in below)
    assert len(tree) < recycling.shape.nodes


def test_refused_nodes_are_learned_and_the_last_of_equal_tokens_counts(target: Target) -> None:
    recycling = TokenRecycling(successors=2)
    recycling.bind(target)
    nodes = torch.tensor([5, 7, 8, 7])
    tree = Tree(nodes, torch.tensor([-1, 0, 0, 2]), torch.tensor([0, 1, 1, 2]), torch.ones(4))
    logits_NV = torch.zeros(4, target.vocab_size)
    for node, (first, second) in enumerate([(1, 2), (3, 4), (6, 9), (11, 10)]):
        logits_NV[node, first], logits_NV[node, second] = 2.0, 1.0
    recycling.read(tree, logits_NV)
    assert recycling._matrix_VK[nodes].tolist() == [[1, 2], [11, 10], [6, 9], [11, 10]]
    assert int((recycling._matrix_VK >= 0).any(-1).sum()) == 3


def test_a_generation_teaches_prompt_and_answer(target: Target) -> None:
    """Every row is what a fresh forward says behind that token, wherever it was read last."""
    recycling = TokenRecycling(nodes=12, depth=3, successors=4, keep=False)
    recycling.bind(target)
    decoder = Decoder(target=target, drafter=recycling, verifier=Greedy(), policy=None)
    # One new token: only the prompt has been read.
    prompt = PROMPTS[2]
    decoder.generate(prompt, max_new_tokens=1)
    features_Td = target.forward(torch.tensor([prompt])).final_BTd[0]
    best_TK = target.project(features_Td).topk(4).indices
    last = {token: t for t, token in enumerate(prompt)}
    known = (recycling._matrix_VK[:, 0] >= 0).nonzero()[:, 0].tolist()
    assert known == sorted(last)
    for token, t in last.items():
        assert recycling._matrix_VK[token].tolist() == best_TK[t].tolist()
    # More: tokens that were refused are known too.
    made = decoder.generate(prompt, max_new_tokens=30, stop_at_eos=False)
    known = set((recycling._matrix_VK[:, 0] >= 0).nonzero()[:, 0].tolist())
    assert known > {*prompt, *made.tokens[:-1]}


def test_the_matrix_is_kept_from_prompt_to_prompt_unless_told_not_to(target: Target) -> None:
    rounds = {}
    for keep in (True, False):
        recycling = TokenRecycling(nodes=12, depth=3, successors=4, keep=keep)
        recycling.bind(target)
        decoder = Decoder(target=target, drafter=recycling, verifier=Greedy(), policy=None)
        rounds[keep] = [
            len(decoder.generate(PROMPTS[0], max_new_tokens=40, stop_at_eos=False).rounds)
            for _ in range(3)
        ]
    assert rounds[False][0] == rounds[False][1] == rounds[False][2] == rounds[True][0]
    assert rounds[True][1] < rounds[True][0]
