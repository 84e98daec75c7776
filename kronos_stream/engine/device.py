"""Choice of device and number format."""

from __future__ import annotations

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AMPERE = 8

ACCELERATOR_SHARE = 0.6
"""Share of a GPU's free memory for caches; the rest is for activations and graphs."""

CPU_BUDGET = 2 * 2**30
"""Bytes for about 30 contexts x 32 paths of Kronos-small; larger batches are no faster."""


def pick_device(name: str = "auto") -> torch.device:
    """Resolve a device name; ``auto`` prefers CUDA, then MPS, then the CPU.

    Raises ValueError if the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} is not available: {reason}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve a type name; ``auto`` is bfloat16 if the hardware multiplies it, else float32.

    Such hardware is CUDA from Ampere on, and CPUs with AMX. CPUs with only AVX512-BF16 use float32,
    because their bf16 matrix product is slower (`kronos-stream bench` shows both rates).
    """
    if name != "auto":
        try:
            return _DTYPES[name]
        except KeyError:
            raise ValueError(f"dtype {name!r}: expected auto, {' or '.join(_DTYPES)}") from None
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= _AMPERE
    else:
        native = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.bfloat16 if native else torch.float32


def free_memory(device: torch.device) -> int:
    """Return the default memory budget of caches in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * ACCELERATOR_SHARE)
    return CPU_BUDGET
