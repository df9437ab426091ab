"""The exact figures of docs/verification.md, computed again."""

from itertools import product
from pathlib import Path

import pytest

from decode.optimal import optimal_acceptance
from decode.verifier.base import Verifier
from decode.verifier.block import Block
from decode.verifier.sampling import Sampling
from decode.verifier.spectr import SpecTr
from decode.verifier.traversal import Traversal
from tests.decode.enumerated import distributions, error_of, mean_accepted, numpy_tables, texts_law
from tests.decode.test_optimal import by_sets
from tests.decode.toy import joint

PAGE = Path(__file__).parents[3] / "docs" / "verification.md"
Cell = tuple[Verifier, bool]
NODE: dict[str, Cell] = {
    "`sampling`, `replacement=true`": (Sampling(), True),
    "`spectr`, `replacement=true`": (SpecTr(), True),
    "`traversal`, `replacement=true`": (Traversal(), True),
    "`sampling`, `replacement=false`": (Sampling(), False),
    "`traversal`, `replacement=false`": (Traversal(), False),
}


def at_one_node() -> dict[str, list[float]]:
    """Rows: the chance that one of k siblings is accepted, two pairs p, q of 5 ids, k = 2 and 3."""
    rows: dict[str, list[float]] = {name: [] for name in NODE}
    rows |= {"one draft": [], "the most, independent": [], "the most, without replacement": []}
    for (p_V, q_V), count in zip(distributions([(5, 2), (5, 3)]), (2, 3), strict=True):
        p = {(): p_V} | {(x,): p_V for x in range(5)}
        for name, (rule, replacement) in NODE.items():
            law = texts_law(p, {(): q_V}, [count], rule, replacement=replacement)
            assert error_of(p, 2, law) < 1e-12
            rows[name].append(mean_accepted(law))
        rows["one draft"].append(optimal_acceptance(p_V, q_V, 1))
        rows["the most, independent"].append(optimal_acceptance(p_V, q_V, count))
        most = by_sets(p_V, q_V, count, replacement=False)
        rows["the most, without replacement"].append(most)
    return rows


def below_each_other() -> dict[str, list[float]]:
    """Rows: mean accepted drafts of a chain of 3 and of a tree of widths [2, 2], 3 ids."""
    rows: dict[str, list[float]] = {}
    p, q = numpy_tables(1, 3, 4, 1.2), numpy_tables(2, 3, 4, 1.2)
    for name, rule in {"sampling": Sampling(), "block": Block(), "traversal": Traversal()}.items():
        law = texts_law(p, q, [1, 1, 1], rule, replacement=True)
        assert error_of(p, 4, law) < 1e-12
        rows[f"`{name}`, chain of 3"] = [mean_accepted(law)]
    rows["the most, chain of 3"] = [
        sum(
            min(joint(p, text), joint(q, text))
            for length in (1, 2, 3)
            for text in product(range(3), repeat=length)
        )
    ]
    p, q = numpy_tables(3, 3, 3, 1.3), numpy_tables(4, 3, 3, 1.3)
    for name, (rule, replacement) in NODE.items():
        law = texts_law(p, q, [2, 2], rule, replacement=replacement)
        assert error_of(p, 3, law) < 1e-12
        rows[f"{name}, widths [2, 2]"] = [mean_accepted(law)]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("table", [at_one_node, below_each_other])
def test_the_page_has_the_computed_figures(table) -> None:
    lines = [
        " | ".join([f"| {name}", *(f"{value:.3f}" for value in values)]) + " |"
        for name, values in table().items()
    ]
    page = PAGE.read_text().splitlines()
    missing = [line for line in lines if line not in page]
    assert not missing, "docs/verification.md should have these lines:\n" + "\n".join(missing)
