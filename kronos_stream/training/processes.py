"""Data-parallel training under ``torchrun``: ranks and averages over processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """Rank of this process and number of processes that train together."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and reports."""
        return self.rank == 0

    def average(self, mean: Tensor) -> Tensor:
        """Average ``mean`` over processes; gradients flow to the part of every process."""
        if self.world == 1:
            return mean
        out: Tensor = _Average.apply(mean)  # type: ignore[no-untyped-call]
        return out

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over processes, in one message."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1:
            dist.destroy_process_group()


class _Average(torch.autograd.Function):
    """Mean over processes, forwards and backwards.

    Every process has the same value and therefore the same gradient of it, and the gradients of
    the parameters are averaged later: the result is the gradient of the joint mean.
    """

    @staticmethod
    def forward(_ctx: Any, mean: Tensor) -> Tensor:  # noqa: ANN401
        mean = mean.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


def join_process_group(device: torch.device) -> ProcessGroup:
    """Join the process group that ``torchrun`` started, or return a group of one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ProcessGroup()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ProcessGroup(dist.get_rank(), world)
