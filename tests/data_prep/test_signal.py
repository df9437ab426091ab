"""What is kept of p: by hand, without bias, and unchanged by the way over the disk."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep.signal import (
    NOTHING,
    Sampled,
    Signal,
    SignalRows,
    TopK,
    id_type,
    pack,
    packed_bytes,
    teaches,
    unpack,
)

P_NV = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]])


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows: int, vocab: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=noise(1)) * scale


def test_top_k_by_hand() -> None:
    rows = TopK(k=2).take(P_NV.log() + 3.0, noise())
    assert rows.ids_NK[0].tolist() == [1, 3]
    assert rows.ids_NK[1, 0] == 0
    torch.testing.assert_close(rows.logp_NK.exp(), torch.tensor([[0.5, 0.25], [0.7, 0.1]]))
    assert rows.tail_N is not None
    torch.testing.assert_close(rows.tail_N.exp(), torch.tensor([0.25, 0.2]))
    assert rows.counts_NK is None


def test_the_tail_is_not_lost_in_rounding() -> None:
    """All but 1e-9 of the mass on one id: one less that, in fp32, would be 0."""
    p_V = torch.full((1, 11), 1e-10, dtype=torch.double)
    p_V[0, 4] = 1 - 1e-9
    rows = TopK(k=1).take(p_V.log(), noise())
    assert rows.tail_N is not None
    assert rows.tail_N.exp().item() == pytest.approx(1e-9, rel=1e-4)


def test_forbidden_ids_stay_finite() -> None:
    """p has one id: what is kept of the others is 0, and no infinity gets into a loss."""
    logits_1V = torch.full((1, 6), float("-inf"))
    logits_1V[0, 2] = 0.0
    rows = TopK(k=3).take(logits_1V, noise())
    assert rows.ids_NK[0, 0] == 2
    assert rows.logp_NK.tolist() == [[0.0, NOTHING, NOTHING]]
    assert rows.tail_N is not None
    assert rows.tail_N.tolist() == [NOTHING]
    drawn = Sampled(draws=7).take(logits_1V, noise())
    assert (drawn.ids_NK.tolist(), drawn.logp_NK.tolist()) == ([[2]], [[0.0]])
    assert drawn.counts_NK is not None
    assert drawn.counts_NK.tolist() == [[7]]


def test_the_argmax_comes_first_among_equals() -> None:
    logits_1V = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
    for signal in (TopK(k=2), Sampled(draws=40)):
        assert signal.take(logits_1V, noise()).best_N.item() == logits_1V.argmax().item() == 1


def test_sampled_entries() -> None:
    """Counts add up, ids are distinct and fall in probability, and p beside them is p's own."""
    made = logits(40, 90)
    p_NV = made.softmax(-1)
    rows = Sampled(draws=30).take(made, noise())
    assert rows.counts_NK is not None
    assert rows.counts_NK.sum(-1).tolist() == [30] * 40
    assert rows.best_N.tolist() == p_NV.argmax(-1).tolist()
    for ids, logp, counts, p_V in zip(rows.ids_NK, rows.logp_NK, rows.counts_NK, p_NV, strict=True):
        named = ids >= 0
        assert len(ids[named].unique()) == int(named.sum())
        assert (counts[named][1:] > 0).all()
        assert (counts[~named] == 0).all()
        assert (logp[~named] == NOTHING).all()
        assert (logp[named].diff() <= 0).all()
        torch.testing.assert_close(logp[named].exp(), p_V[ids[named]])


def test_an_argmax_that_was_never_drawn_is_kept_with_count_0() -> None:
    """Nearly uniform over 500 ids: one draw finds the argmax about never."""
    made = torch.zeros(50, 500)
    made[:, 123] = 0.01
    rows = Sampled(draws=1).take(made, noise())
    assert rows.counts_NK is not None
    assert rows.best_N.tolist() == [123] * 50
    assert (rows.counts_NK[:, 0] == 0).float().mean() > 0.9
    assert rows.counts_NK.sum(-1).tolist() == [1] * 50


def test_counts_are_an_unbiased_estimate_of_p() -> None:
    """20,000 x 50 draws from one p: every mean count within four standard errors."""
    p_V = logits(1, 12)[0].softmax(-1)
    rows = Sampled(draws=50).take(p_V.log().expand(20_000, -1), noise())
    assert rows.counts_NK is not None
    sums_V = torch.zeros(13).index_add_(
        0, (rows.ids_NK % 13).flatten(), rows.counts_NK.flatten().float()
    )
    estimate_V = sums_V[:12] / (20_000 * 50)
    error_V = (p_V * (1 - p_V) / (20_000 * 50)).sqrt()
    assert ((estimate_V - p_V).abs() < 4 * error_V).all()


def test_names_say_all_settings() -> None:
    assert TopK(k=16).name == "topk16"
    assert Sampled(draws=50).name == "sampled50"
    assert Sampled(draws=9, seed=3).name == "sampled9-s3"
    assert Sampled(draws=9).about() == {
        "_target_": "data_prep.signal.Sampled",
        "draws": 9,
        "seed": 0,
    }


@pytest.mark.parametrize("signal", [TopK(k=5), Sampled(draws=20)])
@pytest.mark.parametrize("vocab", [70, 70_000])
def test_the_way_over_the_disk(tmp_path, signal: Signal, vocab: int) -> None:
    """Three examples, one of which teaches nothing. fp16 moves log p by at most 2^-11 of it."""
    lengths = [4, 0, 9]
    rows = signal.take(logits(13, vocab), noise())
    save_file(pack(rows, lengths, vocab), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.get_tensor("ids").dtype == (torch.uint16 if vocab == 70 else torch.int32)
        parts = [unpack(file, i) for i in range(3)]
    assert [len(part) for part in parts] == lengths
    back = SignalRows.join(parts)
    width = back.ids_NK.shape[1]
    assert torch.equal(back.ids_NK, rows.ids_NK[:, :width])
    assert (rows.ids_NK[:, width:] == -1).all()
    error_NK = (back.logp_NK - rows.logp_NK[:, :width]).abs()
    assert (error_NK <= back.logp_NK.abs() * 2**-11 + 1e-7).all()
    change_NK = (back.logp_NK.exp() - rows.logp_NK[:, :width].exp()).abs()
    assert 0 < change_NK.max() <= 1.8e-4
    for one, two in ((back.tail_N, rows.tail_N), (back.counts_NK, rows.counts_NK)):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            two = two[:, :width] if two.ndim == 2 else two
            torch.testing.assert_close(one, two, rtol=2**-11, atol=0)


def test_bytes_by_hand() -> None:
    """TopK: 2 + 2 bytes an id, 1 for their number, 2 for the tail. Sampled: 5 an id and 1."""
    assert packed_bytes(TopK(k=16).take(logits(8, 400), noise()), 400) == 16 * 4 + 3
    assert packed_bytes(TopK(k=16).take(logits(8, 400), noise()), 70_000) == 16 * 6 + 3
    rows = Sampled(draws=50).take(logits(8, 400), noise())
    entries = int((rows.ids_NK >= 0).sum())
    assert packed_bytes(rows, 400) == pytest.approx(5 * entries / 8 + 1)


def test_ids_at_the_edge_of_their_type(tmp_path) -> None:
    assert id_type(2**16) == torch.uint16
    assert id_type(2**16 + 1) == torch.int32
    rows = SignalRows(torch.tensor([[2**16 - 1, 0]]), torch.tensor([[-1.0, -2.0]]))
    save_file(pack(rows, [1], 2**16), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert unpack(file, 0).ids_NK.tolist() == [[2**16 - 1, 0]]


def test_a_position_teaches_when_the_next_token_is_learned() -> None:
    """Token 0 has no position before it."""
    learn = torch.tensor([True, False, True, True, False])
    assert teaches(learn).tolist() == [1, 2]


def test_rows_are_chosen_and_joined_with_their_fillers() -> None:
    one = SignalRows(torch.tensor([[5]]), torch.tensor([[-1.0]]), counts_NK=torch.tensor([[3]]))
    two = SignalRows(
        torch.tensor([[7, 8], [9, -1]]),
        torch.tensor([[-1.0, -2.0], [0.0, NOTHING]]),
        counts_NK=torch.tensor([[2, 1], [3, 0]]),
    )
    both = SignalRows.join([one, two])
    assert both.ids_NK.tolist() == [[5, -1], [7, 8], [9, -1]]
    assert both.logp_NK.tolist() == [[-1.0, NOTHING], [-1.0, -2.0], [0.0, NOTHING]]
    assert both.counts_NK is not None
    assert both.counts_NK.tolist() == [[3, 0], [2, 1], [3, 0]]
    assert both[1:].ids_NK.tolist() == [[7, 8], [9, -1]]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TopK(k=0), "between 1 and 255 ids"),
        (lambda: TopK(k=256), "between 1 and 255 ids"),
        (lambda: Sampled(draws=255), "between 1 and 254 ids"),
        (lambda: TopK(k=20).check(20), "less than the target's vocabulary of 20"),
    ],
)
def test_bad_settings_are_refused(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
