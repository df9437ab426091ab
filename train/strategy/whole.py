"""One checkpoint, whichever strategy wrote it.

A drafter is small beside its target, so its weights and optimizer state are put together on the
host while a checkpoint is written, one tensor at a time. The file is that of a run of one process:
it is read by any strategy on any number of processes, checked in one way, and turned into a drafter
without a cluster.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on the host. Every process must come here."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu()


def like(value: Tensor, ours: Tensor) -> Tensor:
    """A whole tensor, spread as `ours` is."""
    value = value.to(device=ours.device, dtype=ours.dtype)
    if isinstance(ours, DTensor):
        return distribute_tensor(value, ours.device_mesh, ours.placements)
    return value


def whole_state(module: nn.Module, read: Callable[[Tensor], Tensor] = whole) -> dict[str, Tensor]:
    """The state of a module by name; a parameter with two names is read once."""
    seen: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen[id(value)] = read(value)
        state[name] = seen[id(value)]
    return state


class Whole(Strategy):
    """Mixed into a strategy that shards: its checkpoints are whole files, written by rank 0."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def whole_module(self, module: nn.Module) -> dict[str, Tensor]:
        """All weights of (a part of) the trained module, on every process."""
        return whole_state(module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.whole_module(self._module)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        packed = optimizer.state_dict()
        packed["state"] = {
            i: {k: whole(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            for i, state in packed["state"].items()
        }
        return packed

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        ours = self._module.state_dict(keep_vars=True)
        theirs = checkpoint["state_dict"]
        assert not strict or ours.keys() == theirs.keys(), "the checkpoint is of another drafter"
        for name, value in ours.items():
            value.copy_(like(theirs[name], value))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, packed in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {
                    k: like(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v
                    for k, v in packed["state"][i].items()
                }
                for i, p in enumerate(trained)
                if i in packed["state"]
            }
            optimizer.load_state_dict(packed | {"state": state})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


@contextmanager
def whole_context(module: LightningModule) -> Iterator[None]:
    """Inside, the module's weights are whole, for what runs outside of a step."""
    weights = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if weights:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters(weights):
            yield
    elif isinstance(module, FSDPModule):
        module.unshard()
        try:
            yield
        finally:
            module.reshard()
    else:
        yield
