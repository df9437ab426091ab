"""What autocast does to a tensor, asked for by name."""

import torch
from torch import Tensor


def in_autocast(x: Tensor) -> Tensor:
    """x in the dtype that matrix products run in here; x itself without autocast.

    For functions of ours that autocast does not know, and for inputs of several products, which
    autocast would cast once for each.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
