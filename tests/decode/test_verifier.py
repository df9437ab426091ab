"""The output law of every exact rule, by enumeration of each random branch in double precision."""

import pytest
import torch
from torch import Tensor

from decode.verifier import sampling
from decode.verifier.base import Verdict
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from decode.verifier.typical import Typical
from models.drafter.base import Tree
from tests.decode.toy import Scripted, joint, law_error, outcomes, tables

V = 3


def make_tree(nodes: list[tuple[int, int]], q_rows: list[Tensor] | None = None) -> Tree:
    """A tree from (token, parent) pairs; the root's parent is -1."""
    depths = [0]
    for _, parent in nodes[1:]:
        depths.append(depths[parent] + 1)
    return Tree(
        torch.tensor([token for token, _ in nodes]),
        torch.tensor([parent for _, parent in nodes]),
        torch.tensor(depths),
        torch.ones(len(nodes)),
        None if q_rows is None else torch.stack([torch.zeros(V, dtype=torch.double), *q_rows]),
    )


def texts_of(tree: Tree) -> list[tuple]:
    """The drafted tokens on the path to every node."""
    texts: list[tuple] = [()]
    for node in range(1, len(tree)):
        parent = int(tree.parents_N[node])
        texts.append((*texts[parent], int(tree.tokens_N[node])))
    return texts


def verified(tree: Tree, p: dict, rule, chance: Scripted) -> tuple:
    """The tokens a round produces: accepted drafts and the bonus."""
    texts = texts_of(tree)
    verdict = rule.verify(tree, lambda node: p[texts[node]], chance)
    return (*texts[verdict.path[-1]], verdict.token)


def sampled_chain(p: dict, q: dict, gamma: int, *, greedy_draft: bool = False):
    """One round with a chain drawn from q (or its argmax, wrongly labelled as drawn from q)."""

    def round_(chance: Scripted) -> tuple:
        text, nodes, rows = (), [(0, -1)], []
        for _ in range(gamma):
            drawn = int(q[text].argmax()) if greedy_draft else chance.draw(q[text])
            rows.append(q[text])
            nodes.append((drawn, len(nodes) - 1))
            text = (*text, drawn)
        return verified(make_tree(nodes, rows), p, Sampling(), chance)

    return round_


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_a_sampled_chain_keeps_the_law(gamma: int) -> None:
    p, q = tables(1, V, gamma), tables(2, V, gamma)
    assert law_error(p, V, gamma + 1, sampled_chain(p, q, gamma)) < 1e-12


@pytest.mark.parametrize(
    "nodes",
    [
        [(0, -1)],
        [(0, -1), (1, 0)],
        [(0, -1), (2, 0), (0, 0), (1, 0)],
        [(0, -1), (2, 0), (0, 0), (1, 1), (0, 1), (2, 2)],
    ],
)
def test_a_deterministic_tree_keeps_the_law(nodes: list[tuple[int, int]]) -> None:
    p, tree = tables(3, V, 3), make_tree(nodes)
    error = law_error(p, V, 3, lambda chance: verified(tree, p, Sampling(), chance))
    assert error < 1e-12


def test_independent_siblings_from_q_keep_the_law() -> None:
    p, q = tables(4, V, 2), tables(5, V, 2)

    def round_(chance: Scripted) -> tuple:
        drawn = [chance.draw(q[()]) for _ in range(2)]
        below = chance.draw(q[(drawn[0],)])
        nodes = [(0, -1), (drawn[0], 0), (drawn[1], 0), (below, 1)]
        tree = make_tree(nodes, [q[()], q[()], q[(drawn[0],)]])
        return verified(tree, p, Sampling(), chance)

    assert law_error(p, V, 3, round_) < 1e-12


def test_acceptance_of_one_sampled_draft_is_the_overlap() -> None:
    p, q = tables(6, V, 1), tables(7, V, 1)
    kept = sum(w for text, w in outcomes(sampled_chain(p, q, 1)) if len(text) == 2)
    assert kept == pytest.approx(float(torch.minimum(p[()], q[()]).sum()), abs=1e-12)


def test_control_without_the_residual_the_law_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = tables(1, V, 2), tables(2, V, 2)
    monkeypatch.setattr(sampling, "_residual", lambda r_V, token, q_V: r_V)
    assert law_error(p, V, 3, sampled_chain(p, q, 2)) > 1e-2


def test_control_an_argmax_draft_that_claims_to_be_drawn_from_q_is_wrong() -> None:
    p, q = tables(1, V, 2), tables(2, V, 2)
    assert law_error(p, V, 3, sampled_chain(p, q, 2, greedy_draft=True)) > 1e-2


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    p = tables(8, V, 2)
    for text, probability in outcomes(sampled_chain(p, p, 2)):
        assert len(text) == 3 or probability < 1e-15


@pytest.mark.parametrize("rule", [Greedy(), Sampling()])
def test_at_temperature_zero_both_rules_follow_the_argmax(rule) -> None:
    p = {
        text: torch.nn.functional.one_hot(row.argmax(), V).double()
        for text, row in tables(9, V, 3).items()
    }
    best: tuple[int, ...] = ()
    for _ in range(3):
        best = (*best, int(p[best].argmax()))
    first, second = list(best)[:2]
    wrong = [(first + 1) % V, (second + 1) % V]
    tree = make_tree([(0, -1), (wrong[0], 0), (first, 0), (wrong[1], 2), (second, 2)])
    results = list(outcomes(lambda chance: verified(tree, p, rule, chance)))
    assert results == [(best, 1.0)]
    assert joint(p, best) == 1.0


def test_greedy_keeps_the_path_not_the_node_number() -> None:
    rows = torch.eye(4)[[3, 0, 2, 1, 0]]  # argmax after nodes 0..4
    tree = make_tree([(0, -1), (1, 0), (3, 0), (2, 2), (1, 3)])
    verdict = Greedy().verify(tree, lambda node: rows[node], Scripted([]))
    assert verdict == Verdict([0, 2, 3, 4], 0)


def test_typical_says_that_it_is_lossy_or_refuses() -> None:
    with pytest.raises(ValueError, match=r"lossy=true"):
        Typical()
    assert Typical(lossy=True).lossy


def test_typical_by_hand() -> None:
    """p = (.5, .25, .125, .125): H = 1.75 ln 2, e^-H = 2^-1.75 = .2973, bar = min(.09, .0892)."""
    p_V = torch.tensor([0.5, 0.25, 0.125, 0.125])
    sharp_V = torch.tensor([0.9997, 0.0001, 0.0001, 0.0001])  # bar: epsilon = .09
    flat = {0: p_V, 1: sharp_V, 2: p_V, 3: p_V, 4: p_V}
    tree = make_tree([(0, -1), (0, 0), (1, 0), (1, 1), (2, 2)])
    verdict = Typical(lossy=True).verify(tree, lambda node: flat[node], Scripted([]))
    # Node 1 is likelier than node 2, but its child has p = 1e-4; the longer path is 0, 2, 4.
    assert verdict.path == [0, 2, 4]
    strict = Typical(epsilon=0.3, delta=1.0, lossy=True)  # bar = min(.3, .2973): only .5 passes
    assert strict.verify(tree, lambda node: flat[node], Scripted([])).path == [0, 1]


def test_typical_changes_the_law() -> None:
    p, tree = tables(3, V, 2), make_tree([(0, -1), (0, 0)])
    rule = Typical(lossy=True)
    assert law_error(p, V, 2, lambda chance: verified(tree, p, rule, chance)) > 1e-2
