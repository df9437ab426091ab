import pytest
import torch

from models.head import build_head
from models.head.frozen import FrozenHead
from models.head.low_rank import LowRankHead, best_factors
from models.target import Target


@pytest.mark.parametrize("shape", [(200, 32), (20, 32)], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [1, 7, 32])
def test_the_start_is_the_best_matrix_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    """Eckart and Young: the product is the truncated SVD, and what is left are the other values."""
    generator = torch.Generator().manual_seed(1)
    rows_Dd = torch.randn(shape, generator=generator) * torch.linspace(2.0, 0.1, 32)
    down_rd, up_Dr = best_factors(rows_Dd, rank)
    assert down_rd.shape == (rank, 32)
    assert up_Dr.shape == (shape[0], rank)
    u, s, vh = torch.linalg.svd(rows_Dd.double(), full_matrices=False)
    best_Dd = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close((up_Dr @ down_rd).double(), best_Dd, rtol=1e-4, atol=1e-5)
    left = float((rows_Dd - up_Dr @ down_rd).norm())
    assert left == pytest.approx(float(s[rank:].square().sum().sqrt()), rel=1e-4, abs=1e-4)
    # A's rows are orthonormal, B's columns have the singular values for lengths.
    torch.testing.assert_close(down_rd @ down_rd.T, torch.eye(rank), rtol=0, atol=1e-5)
    lengths = up_Dr.norm(dim=0)[: len(s)].double()
    torch.testing.assert_close(lengths, s[:rank], rtol=1e-4, atol=1e-4)


def test_more_rows_than_are_doubled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_Dd = torch.randn(50, 8)
    whole = best_factors(rows_Dd, 3)
    monkeypatch.setattr("models.head.low_rank.ROWS", 7)
    parts = best_factors(rows_Dd, 3)
    torch.testing.assert_close(parts[1] @ parts[0], whole[1] @ whole[0])


@pytest.mark.parametrize("ids", [None, [3, 40, 41, 300]], ids=["whole", "reduced"])
def test_full_rank_is_the_frozen_head(target: Target, ids: list[int] | None) -> None:
    draft_ids_D = None if ids is None else torch.tensor(ids)
    sizes = {"hidden_size": 32, "vocab_size": target.vocab_size if ids is None else len(ids)}
    head = LowRankHead(**sizes, rank=32)
    head.init_from(target, draft_ids_D)
    frozen = FrozenHead(**sizes)
    frozen.bind(target, draft_ids_D)
    states = torch.randn(2, 5, 32)
    torch.testing.assert_close(head(states), frozen(states), rtol=1e-4, atol=1e-4)
    # The two steps the loss takes are the head.
    weight_Dr, bias = head.matrix()
    assert bias is None
    torch.testing.assert_close(head.narrow(states) @ weight_Dr.T, head(states))


def test_weights() -> None:
    head = LowRankHead(hidden_size=32, vocab_size=500, rank=4)
    assert sum(p.numel() for p in head.parameters()) == 4 * (32 + 500)


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_no_matrix_has(rank: int) -> None:
    spec = {"_target_": "models.head.low_rank.LowRankHead", "rank": rank}
    with pytest.raises(ValueError, match=f"head.rank={rank} should lie between 1 and"):
        build_head(spec, hidden_size=32, vocab_size=500)
