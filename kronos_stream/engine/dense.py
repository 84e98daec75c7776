"""Matrix products whose rows do not depend on their companions, and the buffers they write to.

A CPU's matrix library picks its kernel and its blocking over the inner dimension by the number of
rows, so the same row can come out a bit different in a larger batch (seen: inner dimension 1024,
from 17 rows up; any, at a single row). Within a narrow inner block and from a few rows up nothing
changes. Products are therefore taken in blocks of the inner dimension over padded rows, and
:func:`find_stable` finds by trial, at load, limits that hold on this machine. Accelerators and
bf16 make no such promise and take each product whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_PROBE_ROWS = 16
_BATCHES = (_PROBE_ROWS, 17, 48, 160, 512, 1536)

_SERIAL_ELEMENTS = 32768
"""Elementwise kernels stay on one thread up to this size (at::internal::GRAIN_SIZE)."""


class Stable(NamedTuple):
    """Limits within which a row's product does not depend on the other rows."""

    block: int | None
    """Widest inner block; None takes products whole."""
    rows: int
    """Fewest rows of a product."""


UNSTABLE = Stable(block=None, rows=1)
"""For devices and types that promise nothing."""

_CANDIDATES = tuple(Stable(block, rows) for rows in (4, 16) for block in (512, 256, 128, 64))


class Dense:
    """``x @ weight.T + bias`` with the weight laid out for the product, (in, out)."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        block: int | None,
    ) -> None:
        """weight (out, in), bias (out,); ``block`` bounds the inner block, None leaves it whole."""
        out_features, in_features = weight.shape
        parts = 1 if block is None else -(-in_features // block)
        width = -(-in_features // parts)
        self.spans = [(i, min(i + width, in_features)) for i in range(0, in_features, width)]
        laid_out = weight.detach().T.to(device, dtype)
        self.blocks = [laid_out[lo:hi].contiguous() for lo, hi in self.spans]
        self.bias = None if bias is None else bias.detach().to(device, dtype)
        self.out_features = out_features
        self.dtype = dtype

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """Write the product of x (R, in) to ``out`` (R, out) and return it."""
        (lo, hi), first = self.spans[0], self.blocks[0]
        if self.bias is None:
            torch.mm(x[:, lo:hi], first, out=out)
        else:
            torch.addmm(self.bias, x[:, lo:hi], first, out=out)
        for (lo, hi), block in zip(self.spans[1:], self.blocks[1:], strict=True):
            out.addmm_(x[:, lo:hi], block)
        return out

    def add_to(self, x: Tensor, total: Tensor) -> None:
        """Add the product of x (R, in) to the float32 ``total`` (R, out)."""
        if self.dtype != total.dtype:
            total.add_(self(x))
            return
        for (lo, hi), block in zip(self.spans, self.blocks, strict=True):
            total.addmm_(x[:, lo:hi], block)
        if self.bias is not None:
            total.add_(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The product of x (R, in) as a new tensor (R, out)."""
        return self.into(x, x.new_empty(x.shape[0], self.out_features))


class Scratch:
    """Reused buffers, by name: on a CPU, fresh memory costs as much in page faults as the work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The buffer ``name`` in this shape, contents undefined; one use of a name at a time."""
        size = math.prod(shape)
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < size:
            held = torch.empty(size, device=self.device, dtype=dtype)
            self._buffers[name, dtype] = held
        return held[:size].view(*shape)


def swiglu_(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` over (R, 2 ff), in place in the gate half, which is returned."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.device.type != "cpu":
        return F.silu(gate, inplace=True).mul_(up)
    # A CPU kernel spread over threads ends each thread's share with scalar code, whose exp is not
    # the vector code's. Pieces small enough for one thread keep every row on the same code.
    rows = max(1, _SERIAL_ELEMENTS // gate.shape[-1])
    for gate_rows, up_rows in zip(gate.split(rows), up.split(rows), strict=True):
        F.silu(gate_rows, inplace=True).mul_(up_rows)
    return gate


def find_stable(shapes: Iterable[tuple[int, int]]) -> Stable:
    """The least restrictive limits that hold on this CPU for products of these (in, out) shapes.

    Tried on random float32 rows from a fixed seed. Where none holds, which no CPU seen so far
    shows, the strictest are taken, and a warning says what that means.
    """
    distinct = sorted(set(shapes))
    for limits in _CANDIDATES:
        if all(_holds(limits, inner, outer) for inner, outer in distinct):
            return limits
    warnings.warn(
        "this CPU's matrix products depend on the batch however they are taken: paths repeat to "
        "rounding only when the company changes",
        stacklevel=2,
    )
    return _CANDIDATES[-1]


def _holds(limits: Stable, inner: int, outer: int) -> bool:
    generator = torch.Generator().manual_seed(inner * 65537 + outer)
    weight = torch.randn(outer, inner, generator=generator)
    bias = torch.randn(outer, generator=generator)
    dense = Dense(weight, bias, device=torch.device("cpu"), dtype=torch.float32, block=limits.block)
    x = torch.randn(max(_BATCHES), inner, generator=generator)
    probe = x[:_PROBE_ROWS]
    want = dense(probe)
    for rows in range(limits.rows, _PROBE_ROWS):
        if not torch.equal(dense(probe[:rows]), want[:rows]):
            return False
    for rows in _BATCHES:
        # The probed rows come last and, where there is room, first as well.
        got = dense(torch.cat((x[: rows - _PROBE_ROWS], probe)))
        if not torch.equal(got[-_PROBE_ROWS:], want):
            return False
        if rows >= 2 * _PROBE_ROWS and not torch.equal(got[:_PROBE_ROWS], want):
            return False
    return True
