"""A trimmed drafter is the drafter it was, without some rows of its heads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.drafter.base import Drafter
from models.drafter.hydra_heads import HydraHeads
from models.drafter.load import load_drafter
from models.target import Target
from models.trimming import trimmed
from tests.models.test_contract import make, stir

HEADS: dict[str, dict[str, Any]] = {
    "own": {"_target_": "models.head.own.OwnHead", "bias": True},
    "frozen": {"_target_": "models.head.frozen.FrozenHead"},
    # The rank is the width and the vocabulary: only B has a row for every token.
    "low_rank": {"_target_": "models.head.low_rank.LowRankHead", "rank": 32},
}


def saved(target: Target, folder: Path, head: dict[str, Any], size: int | None) -> Drafter:
    torch.manual_seed(1)
    drafter = HydraHeads(
        hidden_size=32,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        num_heads=2,
        prefix_layer=True,
        draft_vocab_size=size,
        head=head,
    )
    if size is not None:
        drafter.set_vocab(torch.arange(3, 3 + 4 * size, 4))
    drafter.bind(target)
    drafter.init_from(target)
    stir(drafter)
    drafter.save_pretrained(folder)
    return load_drafter(folder, target)


@pytest.mark.parametrize("size", [None, 32], ids=["whole", "reduced"])
@pytest.mark.parametrize("head", list(HEADS))
def test_the_logits_that_stay_are_those_there_were(
    target: Target, tmp_path: Path, head: str, size: int | None
) -> None:
    drafter = saved(target, tmp_path / "before", HEADS[head], size)
    ids_M = torch.tensor([3, 11, 15, 119])
    rows = ids_M if size is None else (ids_M - 3) // 4
    smaller = trimmed(tmp_path / "before", drafter, ids_M)
    smaller.save_pretrained(tmp_path / "after")
    tokens_BT = torch.randint(3, target.vocab_size, (2, 11))
    features = target.forward(tokens_BT)
    for after in (smaller, load_drafter(tmp_path / "after", target)):
        assert after.draft_vocab_size == 4
        assert after.draft_ids_D is not None
        assert after.draft_ids_D.tolist() == ids_M.tolist()
        for old, new in zip(
            drafter.unroll(features, tokens_BT), after.unroll(features, tokens_BT), strict=True
        ):
            assert torch.equal(old.states_BNd, new.states_BNd)
            found = new.head(new.states_BNd)
            torch.testing.assert_close(found, old.head(old.states_BNd)[..., rows])


def test_a_head_that_is_an_embedding_is_refused(target: Target, tmp_path: Path) -> None:
    tied = {"embedding": "own", "head": {"_target_": "models.head.tied.TiedHead"}}
    drafter = make("causal_lm", tied, target)
    drafter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a TiedHead cannot be trimmed"):
        trimmed(tmp_path, drafter, torch.tensor([3, 4]))


@pytest.mark.parametrize("family", ["medusa", "causal_lm", "eagle3", "kangaroo"])
def test_other_families(target: Target, tmp_path: Path, family: str) -> None:
    drafter = make(family, {}, target)
    drafter.save_pretrained(tmp_path)
    allowed_D = drafter.draft_ids_D
    ids_M = torch.arange(5, 25) if allowed_D is None else allowed_D[5:25]
    smaller = trimmed(tmp_path, drafter, ids_M)
    tokens_BT = torch.randint(3, target.vocab_size, (1, 9))
    features = target.forward(tokens_BT, layers=drafter.feature_layers)
    for old, new in zip(
        drafter.unroll(features, tokens_BT), smaller.unroll(features, tokens_BT), strict=True
    ):
        rows = ids_M if allowed_D is None else torch.arange(5, 25)
        expected = old.head(old.states_BNd)[..., rows]
        torch.testing.assert_close(new.head(new.states_BNd), expected)
