"""The drafter sharded over the processes by `fully_shard` (FSDP2)."""

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from train.strategy.whole import Whole


class FSDP2(Whole, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy: weights, gradients and optimizer state in shards.

    The module is one group: its weights are gathered when a step begins and its gradients are
    scattered when the backward pass ends, because the loss multiplies heads chunk by chunk outside
    of their own forward.
    """

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__(process_group_backend=backend, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        # All processes hold shards of one drafter; none of them splits a product with another.
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard(self, module: LightningModule) -> None:
        """Called by the module's configure_model, before its optimizer is made."""
        if isinstance(module, FSDPModule):
            return
        fully_shard(module, mesh=self.device_mesh["data_parallel"], reshard_after_forward=False)
        for step in ("training_step", "validation_step"):
            register_fsdp_forward_method(module, step)
