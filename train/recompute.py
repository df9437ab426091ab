"""Activation checkpointing: activations are computed again in the backward pass, not kept.

What is wrapped has no memory of its own: the decoder layers of language models, and the MLPs of
layers that also write keys and values.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_activations(drafter: nn.Module) -> int:
    """Wrap what can be; returns how many modules that is. Raises ValueError when there is none."""
    wrapped: list[nn.Module] = []
    for module in drafter.modules():
        inside = any(module in set(outer.modules()) for outer in wrapped)
        if inside or not (_is_mlp(module) or isinstance(module, GradientCheckpointingLayer)):
            continue
        wrapped.append(module)
        module.forward = partial(_run, module.forward)  # type: ignore[method-assign]
    if not wrapped:
        raise ValueError(
            f"trainer.recompute=true computes activations of decoder layers again, but "
            f"{type(drafter).__name__} has none; leave it out."
        )
    return len(wrapped)


def _is_mlp(module: nn.Module) -> bool:
    return type(module).__name__.endswith("MLP") and hasattr(module, "down_proj")


def _run(forward, *args, **kwargs):  # type: ignore[no-untyped-def]
    # A cache would be written twice.
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
