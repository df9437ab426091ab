import pytest
import torch

from train.schedule import warmup_cosine


def rates(total: int, **settings: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = warmup_cosine(optimizer=optimizer, total_steps=total, **settings)
    seen = []
    for _ in range(total + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_by_hand() -> None:
    """Ten steps, two of warm-up, floor a half: 1/2, 1, then 0.75 + 0.25 cos(pi i/8)."""
    seen = rates(10, warmup=0.2, floor=0.5)
    assert seen[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert seen[6] == pytest.approx(2.0 * 0.75)  # half-way
    assert seen[10] == pytest.approx(1.0)


def test_shares_are_checked() -> None:
    with pytest.raises(ValueError, match="warmup must be at least 0"):
        rates(10, warmup=100.0)
