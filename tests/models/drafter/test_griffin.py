"""GRIFFIN's own maths; the contract tests cover the rest."""

import torch
from torch.nn import functional as F

from models.drafter.griffin import Griffin
from models.target import Target


def _griffin(target: Target) -> Griffin:
    torch.manual_seed(0)
    drafter = Griffin(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head={"_target_": "models.head.frozen.FrozenHead"},
    )
    drafter.bind(target)
    return drafter.eval()


def test_the_fusion_reads_both_through_one_norm(target: Target) -> None:
    """y = z + D SiLU(U [RMSNorm(z); RMSNorm(E)]), z = C [E; f] + c."""
    drafter = _griffin(target)
    e, f = torch.randn(2, 3, target.hidden_size)
    z = torch.cat([e, f], dim=-1) @ drafter.fc.weight.T + drafter.fc.bias
    both = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (z, e)]
    expected = z + F.silu(torch.cat(both, dim=-1) @ drafter.up.weight.T) @ drafter.down.weight.T
    torch.testing.assert_close(drafter.mix(e, f)[0], expected, rtol=1e-5, atol=1e-5)


def test_two_outputs_and_no_gradient_between_the_forwards(target: Target) -> None:
    drafter = _griffin(target)
    tokens_BT = torch.randint(3, target.vocab_size, (1, 9))
    depths = list(drafter.unroll(target.forward(tokens_BT), tokens_BT))
    assert [depth.shift for depth in depths] == [1, 2, 3]
    first, second, _ = depths
    assert first.feature_BNd is not None
    assert not torch.allclose(first.states_BNd, first.feature_BNd)
    # What is fed back is the second half, whose rows of the output then learn nothing from it.
    (gradient,) = torch.autograd.grad(second.states_BNd.sum(), drafter.layer.mlp.down_proj.weight)
    d = target.hidden_size
    assert float(gradient[:d].abs().max()) > 0
    assert float(gradient[d:].abs().max()) == 0
