"""A whole drafter in every process, gradients averaged."""

from lightning.pytorch.strategies import DDPStrategy


class DDP(DDPStrategy):
    """Lightning's DDPStrategy.

    `backend` null is NCCL on CUDA devices and Gloo on CPUs. Parameters may go unused in a step (a
    feature prediction that no loss looks at), so the graph is searched for them.
    """

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__(
            process_group_backend=backend, find_unused_parameters=True, forward_sync_buffers=False
        )
