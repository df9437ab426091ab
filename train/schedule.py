"""Learning rate over optimizer steps."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    *, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, floor: float = 0.1
) -> LambdaLR:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine to `floor`.

    With w warm-up steps of n, the factor of step i (0-based) is (i+1)/w while i < w, then
    floor + (1 - floor) (1 + cos(pi (i - w) / (n - w))) / 2. `floor` is a share of the peak rate.
    """
    if not (0 <= warmup < 1 and 0 <= floor <= 1):
        raise ValueError(
            f"scheduler.warmup={warmup} and scheduler.floor={floor} are shares (of all steps, of "
            "the peak rate): warmup must be at least 0 and below 1, floor between 0 and 1."
        )
    first = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / first
        done = min(1.0, (step - first) / max(1, total_steps - first))
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)
