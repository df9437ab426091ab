"""Where a model runs, and in which dtype, when that is left to the program."""

import os

import torch


def pick_device(device: str) -> torch.device:
    """`auto` is this process's accelerator (the first one, for the first process), else the CPU."""
    if device != "auto":
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device("cuda", local % torch.cuda.device_count())


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it natively, else fp32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def has_fast_bf16(device: torch.device) -> bool:
    """True when matrix products in bf16 are native on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
