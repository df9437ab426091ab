import math

import pytest
import torch
from torch import Tensor

from train.losses import CrossEntropy, ForwardKL, RowLoss, Rows, TargetRows, Term, WeightedSum


def rows(logits: Tensor, label: list[int], p: Tensor | None = None) -> Rows:
    target = None if p is None else TargetRows(p.log())
    return Rows(logits.log_softmax(-1), torch.tensor(label), target)


def test_cross_entropy_by_hand() -> None:
    """q = (1/4, 3/4): -log 3/4 for the second token, nothing for a label outside."""
    logits = torch.tensor([[0.0, math.log(3.0)]]).repeat(2, 1)
    assert CrossEntropy()(rows(logits, [1, -1])).tolist() == pytest.approx([math.log(4 / 3), 0.0])


def test_cross_entropy_outside_the_vocabulary_has_no_gradient() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    CrossEntropy()(rows(logits, [3, -1])).sum().backward()
    assert logits.grad is not None
    expected = logits.detach()[0].softmax(-1) - torch.eye(5)[3]
    torch.testing.assert_close(logits.grad[0], expected)
    assert logits.grad[1].tolist() == [0.0] * 5


def test_forward_kl_by_hand() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log(3)/2."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    value = ForwardKL()(rows(logits, [0], torch.tensor([[0.5, 0.5]])))
    assert value.item() == pytest.approx(math.log(2) - math.log(3) / 2)


def test_forward_kl_is_zero_where_q_is_p() -> None:
    logits = torch.randn(6, 9, requires_grad=True)
    value = ForwardKL()(rows(logits, [0] * 6, logits.detach().softmax(-1)))
    assert value.tolist() == pytest.approx([0.0] * 6, abs=1e-6)
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-7


def test_forward_kl_gradient_keeps_outside_mass_out() -> None:
    """Gradient P_D q - p, with P_D = 0.7 of p's mass inside the draft vocabulary."""
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    p = 0.7 * torch.randn(4, 7, dtype=torch.float64).softmax(-1)
    ForwardKL()(rows(logits, [0] * 4, p)).sum().backward()
    torch.testing.assert_close(logits.grad, 0.7 * logits.detach().softmax(-1) - p)


@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL()])
def test_gradient_matches_finite_differences(loss: RowLoss) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    p = torch.randn(3, 5, dtype=torch.float64).softmax(-1)
    assert torch.autograd.gradcheck(lambda z: loss(rows(z, [0, 4, -1], p)), (logits,))


@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL()])
def test_adding_a_constant_to_logits_changes_nothing(loss: RowLoss) -> None:
    logits, p = torch.randn(3, 5), torch.randn(3, 5).softmax(-1)
    shifted = loss(rows(logits + 7.0, [0, 4, 1], p))
    torch.testing.assert_close(shifted, loss(rows(logits, [0, 4, 1], p)))


def test_weighted_sum_adds_its_terms() -> None:
    logits, p = torch.randn(3, 5), torch.randn(3, 5).softmax(-1)
    given = rows(logits, [0, 4, 1], p)
    both = WeightedSum(
        terms={
            "kl": Term(weight=2.0, loss=ForwardKL()),
            "ce": Term(weight=0.5, loss=CrossEntropy()),
        }
    )
    expected = 2.0 * ForwardKL()(given) + 0.5 * CrossEntropy()(given)
    torch.testing.assert_close(both(given), expected)
    assert both.needs_target


def test_weighted_sum_needs_a_term() -> None:
    with pytest.raises(ValueError, match="no term with a weight"):
        WeightedSum(terms={"ce": Term(weight=0.0, loss=CrossEntropy())})


def test_a_term_of_weight_zero_asks_for_no_target() -> None:
    only = WeightedSum(
        terms={
            "ce": Term(weight=1.0, loss=CrossEntropy()),
            "kl": Term(weight=0.0, loss=ForwardKL()),
        }
    )
    assert not only.needs_target


def test_buckets_by_hand() -> None:
    """q = (1, 2, 3, 4)/10; named 3 and 1, one bucket empty: 4/10, 2/10, 0, and a tail of 4/10."""
    logq = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    target = TargetRows(
        torch.tensor([[0.5, 0.2, 0.0, 0.3]]).log().clamp(min=-1e4), torch.tensor([[3, 1, -1]])
    )
    assert target.view(logq).exp()[0].tolist() == pytest.approx([0.4, 0.2, 0.0, 0.4])
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    given = Rows(logq, torch.tensor([2]), target)
    assert ForwardKL()(given).item() == pytest.approx(expected, rel=1e-5)
    # A label in the tail keeps its own probability.
    assert CrossEntropy()(given).item() == pytest.approx(-math.log(0.3))


def test_tail_bucket_gradient_is_that_of_the_full_divergence_on_named_ids() -> None:
    """On K: q - p. Elsewhere: q (1 - p_tail / q_tail)."""
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    p = torch.randn(3, 9, dtype=torch.float64).softmax(-1)
    q = logits.detach().softmax(-1)
    ids = p.topk(4).indices
    named = p.gather(-1, ids)
    buckets = torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1).log()
    target = TargetRows(buckets, ids)
    ForwardKL()(Rows(logits.log_softmax(-1), torch.zeros(3).long(), target)).sum().backward()
    ratio = (1 - named.sum(-1, keepdim=True)) / (1 - q.gather(-1, ids).sum(-1, keepdim=True))
    expected = (q * (1 - ratio)).scatter(-1, ids, (q - p).gather(-1, ids))
    torch.testing.assert_close(logits.grad, expected)


def test_naming_every_token_leaves_an_empty_tail() -> None:
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    p = torch.randn(2, 5, dtype=torch.float64).softmax(-1)
    ids = torch.arange(5).expand(2, 5)
    logp = torch.cat([p.log(), torch.full((2, 1), -1e4, dtype=torch.float64)], -1)
    value = ForwardKL()(Rows(logits.log_softmax(-1), torch.zeros(2).long(), TargetRows(logp, ids)))
    torch.testing.assert_close(value, ForwardKL()(rows(logits, [0, 0], p)))
    value.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - p)
