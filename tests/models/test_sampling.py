"""The one place that turns logits into p and q."""

import torch

from models.sampling import probabilities, sample

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def test_temperature_scales_logits() -> None:
    p = probabilities(LOGITS, temperature=0.5)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(p[0], squares / squares.sum())


def test_greedy_puts_all_mass_on_the_first_argmax() -> None:
    p = probabilities(torch.tensor([[1.0, 3.0, 3.0]]), temperature=0.0)
    assert p.tolist() == [[0.0, 1.0, 0.0]]


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    # 0.5 alone does not reach 0.7; 0.5 + 0.3 does.
    p = probabilities(LOGITS, temperature=1.0, top_p=0.7)
    torch.testing.assert_close(p[0], torch.tensor([0.625, 0.375, 0.0, 0.0]))
    # The most likely id stays even when it alone exceeds top_p.
    p = probabilities(LOGITS, temperature=1.0, top_p=0.1)
    torch.testing.assert_close(p[0], torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_top_k() -> None:
    p = probabilities(LOGITS, temperature=1.0, top_k=2)
    torch.testing.assert_close(p[0], torch.tensor([0.625, 0.375, 0.0, 0.0]))


def test_samples_follow_the_distribution() -> None:
    p = probabilities(LOGITS, temperature=1.0).expand(40_000, -1)
    drawn = sample(p, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=4).double()
    expected = torch.tensor([0.5, 0.3, 0.15, 0.05]).double() * 40_000
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.27  # 3 degrees of freedom, 0.1 %
