"""What a vocabulary matrix of the drafter's own begins as."""

import pytest
import torch

from models.head.own import OwnHead
from models.target import Target


def test_it_starts_from_the_rows_of_the_draft_vocabulary(target: Target) -> None:
    ids_D = torch.tensor([3, 5, 8, 13])
    head = OwnHead(hidden_size=target.hidden_size, vocab_size=4, bias=True)
    head.init_from(target, ids_D)
    assert torch.equal(head.linear.weight.detach(), target.head_weight_Vd[ids_D])
    assert head.linear.bias is not None
    assert not head.linear.bias.any()


def test_or_random(target: Target) -> None:
    torch.manual_seed(0)
    head = OwnHead(hidden_size=target.hidden_size, vocab_size=target.vocab_size, start="random")
    before = head.linear.weight.detach().clone()
    head.init_from(target, None)
    assert torch.equal(head.linear.weight.detach(), before)
    assert float(before.std()) == pytest.approx((3 * target.hidden_size) ** -0.5, rel=0.1)
