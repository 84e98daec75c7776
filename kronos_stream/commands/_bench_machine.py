"""Rates of this machine: matrix products and memory bandwidth; timing of calls on a device."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates of this machine."""

    device: str
    threads: int
    torch: str
    gflops: dict[str, float]
    gigabytes_per_second: float


def measure_machine(device: torch.device) -> Machine:
    """Measure the fastest matrix product of shapes like the model's, and reading from memory."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        gflops={
            str(dtype).removeprefix("torch."): _product_rate(device, dtype) / 1e9
            for dtype in (torch.float32, torch.bfloat16)
        },
        gigabytes_per_second=_read_rate(device) / 1e9,
    )


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products, with preallocated output."""
    rates = []
    large = (
        ((8192, 8192, 8192),) if device.type == "cuda" else ((512, 512, 2048), (1024, 1024, 1024))
    )
    for m, k, n in large:
        x = torch.randn(m, k, device=device).to(dtype)
        w = torch.randn(k, n, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        seconds = median_seconds(partial(torch.mm, x, w, out=out), device, 15)
        rates.append(2 * m * k * n / seconds)
    return max(rates)


def _read_rate(device: torch.device) -> float:
    """Bytes/s of summing a vector much larger than the caches."""
    values = torch.ones(2**26, device=device)
    return values.nbytes / median_seconds(values.sum, device, 7)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of ``call``, after one call to warm up."""
    call()
    return statistics.median(time_call(call, device) for _ in range(repeats))


def time_call(call: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = perf_counter()
    call()
    synchronise(device)
    return perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
