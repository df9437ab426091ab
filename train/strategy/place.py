"""How many processes a run has, before any of them is started."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

Count = int | Literal["auto"]


@dataclass(frozen=True)
class Place:
    """`devices` processes on each of `nodes` machines."""

    devices: int = 1
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.devices * self.nodes


def find_place(*, devices: Count = 1, nodes: Count = 1) -> Place:
    """`auto` is what Slurm or torchrun started; without them every accelerator of this machine."""
    env = os.environ
    if "SLURM_STEP_ID" in env or "SLURM_PROCID" in env:
        found_nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        found = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1))) // found_nodes
    elif "LOCAL_WORLD_SIZE" in env:
        found = int(env["LOCAL_WORLD_SIZE"])
        found_nodes = int(env["WORLD_SIZE"]) // found
    else:
        found, found_nodes = max(1, torch.cuda.device_count()), 1
    return Place(
        devices=max(1, found) if devices == "auto" else devices,
        nodes=found_nodes if nodes == "auto" else nodes,
    )


def shared_step(*, micro_batches: int, world: int) -> int:
    """Micro-batches of a step that each process makes, when a run goes on with `world` of them."""
    if micro_batches % world:
        raise ValueError(
            f"A step of this run has {micro_batches} micro-batches and cannot be shared by {world} "
            "processes, expected a divisor, so that every step learns from the same text as "
            f"before; resume with {_divisors(micro_batches)} processes."
        )
    return micro_batches // world


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)
