"""Matrix products whose rows do not depend on their companions, and the buffers they write to.

A CPU's matrix library picks its blocking over the inner dimension by the number of rows, so the
same row can come out a bit different in a larger batch (seen: inner dimension 1024, from 17 rows
up). Within a narrow inner block nothing changes. Products are therefore taken in blocks of the
inner dimension, and :func:`stable_block` finds by trial, at load, a width that holds on this
machine. Accelerators and bf16 make no such promise and use one block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_ROWS = 16
"""Rows a product is padded to on the CPU: with fewer, other kernels answer."""

_BLOCK_WIDTHS = (512, 256, 128, 64)
_TRIAL_ROWS = (MIN_ROWS, 17, 48, 160, 512, 1536)
_SERIAL_ELEMENTS = 32768
"""Elementwise kernels stay on one thread up to this size (at::internal::GRAIN_SIZE)."""


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
    """Reused buffers, by name: allocating anew costs a quarter of a CPU matrix product."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        """The first ``rows`` rows of the buffer ``name``, (rows, width), contents undefined."""
        held = self._buffers.get((name, width))
        if held is None or held.shape[0] < rows:
            held = torch.empty(rows, width, device=self.device, dtype=self.dtype)
            self._buffers[name, width] = held
        return held[:rows]


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


def stable_block(shapes: Iterable[tuple[int, int]]) -> int:
    """The widest inner block for which rows do not depend on the row count, on this CPU.

    shapes: (in, out) of every product; tried on random float32 rows from a fixed seed. Falls back
    to the narrowest width where none is stable, which no CPU seen so far does.
    """
    distinct = sorted(set(shapes))
    for width in _BLOCK_WIDTHS:
        if all(_is_stable(min(width, inner), outer) for inner, outer in distinct):
            return width
    return _BLOCK_WIDTHS[-1]


def _is_stable(inner: int, outer: int) -> bool:
    generator = torch.Generator().manual_seed(inner * 65537 + outer)
    weight = torch.randn(outer, inner, generator=generator)
    bias = torch.randn(outer, generator=generator)
    dense = Dense(weight, bias, device=torch.device("cpu"), dtype=torch.float32, block=None)
    x = torch.randn(max(_TRIAL_ROWS), inner, generator=generator)
    want = dense(x[:MIN_ROWS])
    for rows in _TRIAL_ROWS:
        # The probed rows come first and, once more, last.
        batch = torch.cat((x[: rows - MIN_ROWS], x[:MIN_ROWS]))
        got = dense(batch)
        if not torch.equal(got[-MIN_ROWS:], want):
            return False
        if rows >= 2 * MIN_ROWS and not torch.equal(got[:MIN_ROWS], want):
            return False
    return True
