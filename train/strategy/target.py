"""The frozen target in shards: one copy a machine, for a target that does not fit beside a drafter.

Whichever strategy trains the drafter. The weights of a decoder layer lie spread over the processes
of a machine, are put together when the layer begins and let go when it ends (`fully_shard` without
gradients). Embedding, final norm and vocabulary head stay whole in every process: drafters and
losses read their rows at any time.
"""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from conf.check import build
from conf.console import say
from models.device import has_fast_bf16, pick_device
from models.target import Target
from train.strategy.place import Place


def check_shared(cfg: DictConfig, place: Place) -> None:
    """Refuse, before anything is loaded, what one process alone would do with the target.

    Raises ValueError.
    """
    given = "trainer.shard_target=true spreads the target over the processes of a machine"
    if place.devices < 2:
        raise ValueError(
            f"{given}, but trainer.devices is {place.devices}; give trainer=ddp, fsdp2 or "
            "deepspeed_* with 2 devices or more, or leave it out."
        )
    onpolicy = cfg.get("onpolicy")
    alone = {
        "final_decode": cfg.get("final_decode") is not None,
        "acceptance": cfg.get("acceptance") is not None,
        "onpolicy": onpolicy is not None and onpolicy.get("mode") == "interleaved",
    }
    found = [name for name, asked in alone.items() if asked]
    if found:
        raise ValueError(
            f"{given}, which must then all run it equally often, but {', '.join(found)} "
            "runs it in one process alone, or for as many tokens as that writes; set it to null "
            "(python -m decode measures a finished run on one machine)."
        )


def load_on_host(node: DictConfig) -> tuple[Target, torch.device]:
    """The target, whole, in the host's memory; and the device where its shards will be."""
    device = pick_device(str(node.get("device", "auto")))
    settings: dict[str, Any] = dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
    if settings.get("dtype", "auto") == "auto":
        settings["dtype"] = "bfloat16" if has_fast_bf16(device) else "float32"
    return build(settings | {"device": "cpu"}), device


def shard_target(target: Target, *, device: torch.device, local: int) -> None:
    """Spread the decoder layers over the `local` processes of each machine; called in all of them,
    once they know each other."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(
        device.type, (world // local, local), mesh_dim_names=("machine", "process")
    )["process"]
    # Layer by layer: transformers no longer knows a decoder whose class has been changed.
    for layer in target.layers:
        fully_shard(layer, mesh=mesh)
    if device.type != "cpu":
        for value in (*target.model.parameters(), *target.model.buffers()):
            if not isinstance(value, DTensor):
                value.data = value.data.to(device)
    here = sum(held(p) for p in target.model.parameters())
    say(
        f"Target in shards: each process holds {here / 1e6:.2f} M of its "
        f"{target.num_parameters / 1e6:.2f} M parameters."
    )


def held(parameter: Tensor) -> int:
    """Elements of a parameter that this process has."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
