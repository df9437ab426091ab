"""DeepSpeed's ZeRO stages 1 to 3.

    1  the optimizer state is sharded
    2  and the gradients
    3  and the weights, gathered when a step begins

Weights stay fp32 and products run under autocast, as without DeepSpeed, so that the numbers are the
same.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from train.strategy.whole import Whole, whole, whole_state


class Fp32Weights(DeepSpeedPrecision):
    """DeepSpeed's fp32 training; `forward_context` is the autocast that the module enters itself.

    Entered outside of DeepSpeed's engine it would be switched off there.
    """

    def __init__(self, *, dtype: torch.dtype | None, device_type: str) -> None:
        super().__init__("32-true")
        self.autocast_dtype, self.device_type = dtype, device_type

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype)

    def train_step_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        return nullcontext()

    def val_step_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        return data  # features keep the dtype of the target


class DeepSpeed(Whole, DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy of one ZeRO stage.

    `bucket` is the number of elements reduced or gathered at once.
    """

    def __init__(
        self, *, stage: Literal[1, 2, 3], bucket: int = 50_000_000, backend: str | None = None
    ) -> None:
        super().__init__(
            stage=stage,
            allgather_bucket_size=bucket,
            reduce_bucket_size=bucket,
            logging_batch_size_per_gpu=1,
            logging_level=logging.ERROR,
            process_group_backend=backend,
        )

    def _setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        engine, made = super()._setup_model_and_optimizer(*args, **kwargs)
        if self.zero_stage_3:
            from deepspeed.runtime.zero.partition_parameters import register_external_parameter

            # The loss multiplies heads outside of their own forward: a step gathers all weights.
            for parameter in self._module.parameters():
                register_external_parameter(self._module, parameter)
            # Parts of the drafter then gather nothing. DeepSpeed would also want each process to
            # call them equally often, but how often depends on its micro-batch. Two hooks a module,
            # those of the whole one last.
            zero: Any = made
            offload = zero.parameter_offload
            for hooks in (offload.forward_hooks, offload.backward_hooks):
                for hook in hooks[:-2]:
                    hook.remove()
                del hooks[:-2]
        return engine, made

    # --- whole tensors of what is sharded --------------------------------------------------------

    def whole_module(self, module: nn.Module) -> dict[str, Tensor]:
        return whole_state(module, self._read)

    def _read(self, value: Tensor) -> Tensor:
        if not hasattr(value, "ds_id"):
            return whole(value)
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([value]):
            return whole(value).clone()

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        ours = self._module.state_dict(keep_vars=True)
        theirs = checkpoint["state_dict"]
        assert not strict or ours.keys() == theirs.keys(), "the checkpoint is of another drafter"
        for name, value in ours.items():
            if not hasattr(value, "ds_id"):
                value.copy_(theirs[name])
                continue
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            with GatheredParameters([value], modifier_rank=0):
                value.copy_(theirs[name])
        # The optimizer steps on weights of its own, flattened.
        self._zero.refresh_fp32_params()

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around ours."""
        return self.optimizers[0]

    @property
    def _flat(self) -> list[Tensor]:
        """The flattened tensors that our optimizer steps on: this process's parts."""
        zero = self._zero
        if self.zero_stage_3:
            return list(zero.fp32_partitioned_groups_flat)
        return list(zero.single_partition_of_fp32_groups)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As our optimizer would save it in one process: by the number of each parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        ours: Optimizer = self._zero.optimizer
        groups = trained_parameters(self._module)
        self._link_states()
        state: dict[int, dict[str, Any]] = {}
        kept: dict[str, Any] = next((ours.state[p] for p in self._flat if ours.state.get(p)), {})
        for i, parameter in enumerate(p for group in groups for p in group):
            if not kept:
                break
            state[i] = {}
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.ndim:
                    full = safe_get_full_optimizer_state(parameter, name)
                    assert full is not None
                    state[i][name] = full.detach().cpu().view(_shape(parameter)).clone()
                else:
                    state[i][name] = value.clone() if isinstance(value, Tensor) else value
        number = 0
        packed_groups = []
        for group, settings in zip(groups, ours.param_groups, strict=True):
            packed = {k: v for k, v in settings.items() if k != "params"}
            packed_groups.append(packed | {"params": [number + i for i in range(len(group))]})
            number += len(group)
        return {"state": state, "param_groups": packed_groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The reverse: each process takes its part of every tensor."""
        (packed,) = checkpoint["optimizer_states"]
        ours: Optimizer = self._zero.optimizer
        for settings, saved in zip(ours.param_groups, packed["param_groups"], strict=True):
            settings.update({k: v for k, v in saved.items() if k != "params"})
        if not packed["state"]:
            return
        first: dict[str, Any] = packed["state"][0]
        for flat in self._flat:
            ours.state[flat] = {
                name: torch.zeros_like(flat)
                if isinstance(value, Tensor) and value.ndim
                else (value.clone() if isinstance(value, Tensor) else value)
                for name, value in first.items()
            }
        self._link_states()
        for i, parameter in enumerate(
            p for group in trained_parameters(self._module) for p in group
        ):
            for name, value in packed["state"][i].items():
                if isinstance(value, Tensor) and value.ndim:
                    self._set_state(parameter, name, value)

    def _link_states(self) -> None:
        """Let DeepSpeed find each parameter's part of the optimizer state (stages 1 and 2).

        It does so itself after the step of the first group, when the others have no state yet.
        """
        if not self.zero_stage_3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_state(self, parameter: Any, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(self.root_device).flatten()
        if not self.zero_stage_3:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        part = parameter.ds_tensor.numel()  # the last process's part ends in padding
        padded = F.pad(value, (0, part * self.world_size - len(value)))
        mine = padded[part * self.global_rank : part * (self.global_rank + 1)]
        safe_set_local_optimizer_state(parameter, mine, name)


def trained_parameters(module: LightningModule) -> list[list[nn.Parameter]]:
    """The parameters of the module's optimizer, group by group, as they were when it was made."""
    groups: Callable[[], list[list[nn.Parameter]]] = module.trained_groups  # type: ignore[assignment]
    return groups()


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
