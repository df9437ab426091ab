"""The cumulative chance of a rejection, worked by hand."""

import pytest

from decode.stop.specdec_pp import SpecDecPp
from models.acceptance import AcceptanceHead
from tests.decode.stop.told import Told


def head() -> AcceptanceHead:
    return AcceptanceHead(state_size=4, embedding_size=4, reads="candidate")


def ends(rule: SpecDecPp, chances: list[float]) -> list[bool]:
    return [rule.ends(Told(depth=k, acceptance=chance)) for k, chance in enumerate(chances)]


def test_it_ends_where_the_product_has_fallen_far_enough() -> None:
    # 0.9, 0.81, 0.729, 0.656: R passes 0.3 at the fourth.
    assert ends(SpecDecPp(threshold=0.3, acceptance=head()), [0.9] * 4) == [False] * 3 + [True]


def test_every_draft_begins_anew() -> None:
    rule = SpecDecPp(threshold=0.3, acceptance=head())
    assert ends(rule, [0.5]) == [True]
    assert ends(rule, [0.9, 0.9]) == [False, False]


def test_a_least_number_of_drafts_is_made() -> None:
    rule = SpecDecPp(threshold=0.3, least=3, acceptance=head())
    assert ends(rule, [0.1, 0.1, 0.9]) == [False, False, True]


def test_a_run_without_a_head_is_told_how_to_train_one() -> None:
    with pytest.raises(ValueError, match=r"\+experiment=specdec_pp start="):
        SpecDecPp(threshold=0.3, acceptance=None)
    with pytest.raises(ValueError, match=r"stop\.threshold=1"):
        SpecDecPp(threshold=1.0, acceptance=head())
