"""Batch-invariant matrix products, and the buffers they write to.

A CPU's matrix library chooses its kernel and its blocking of the inner dimension by the number of
rows, so the same row can differ in its last bits in a larger batch. oneDNN differs only for one
row; MKL also at an inner dimension of 1024 from 17 rows up and, on AMD, at fewer than 12 outputs.
Within a narrow inner block and from a few rows up results do not change.
:func:`find_batch_invariant_limits` tests at load which library and limits hold on this machine.
oneDNN is tried first: on AMD it uses AVX-512, which MKL uses only on Intel, and is twice as fast.
Products on accelerators and in bf16 are not batch-invariant and are computed undivided.
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

_ONEDNN = torch.ops.mkldnn
"""oneDNN's operations on packed weights; torch's compiler uses them for linear layers on a CPU."""

_SERIAL_ELEMENTS = 32768
"""Elementwise kernels stay on one thread up to this size (at::internal::GRAIN_SIZE)."""


class BatchInvariantLimits(NamedTuple):
    """Limits within which a row's product does not depend on the other rows."""

    packed: bool
    """Use oneDNN, with weights in its packed layout."""
    block: int | None
    """Widest inner block; None computes products undivided."""
    rows: int
    """Minimum number of rows of a product."""


ROW_BY_ROW = BatchInvariantLimits(packed=False, block=None, rows=1)
"""No limits, for devices and types without batch-invariant products."""

_CANDIDATES = (
    *(BatchInvariantLimits(packed=True, block=block, rows=4) for block in (None, 512, 128)),
    *(
        BatchInvariantLimits(packed=False, block=block, rows=rows)
        for rows in (4, 16)
        for block in (512, 256, 128, 64)
    ),
)


class Dense:
    """``x @ weight.T + bias`` with the weight stored packed or as (in, out)."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        limits: BatchInvariantLimits,
    ) -> None:
        """weight: (out, in); bias: (out,); limits: batch-invariance limits of the products."""
        out_features, in_features = weight.shape
        parts = 1 if limits.block is None else -(-in_features // limits.block)
        width = -(-in_features // parts)
        self.spans = [(i, min(i + width, in_features)) for i in range(0, in_features, width)]
        weight = weight.detach().to(device, dtype)
        blocks = [weight[:, lo:hi] for lo, hi in self.spans]
        self.packed = limits.packed
        self.blocks = [_pack(b) if self.packed else b.T.contiguous() for b in blocks]
        self.bias = None if bias is None else bias.detach().to(device, dtype)
        self.out_features = out_features
        self.dtype = dtype

    def multiply_into(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the product of x (R, in), in ``out`` (R, out) unless oneDNN allocates it."""
        if self.packed:
            return self(x)
        (lo, hi), first = self.spans[0], self.blocks[0]
        if self.bias is None:
            torch.mm(x[:, lo:hi], first, out=out)
        else:
            torch.addmm(self.bias, x[:, lo:hi], first, out=out)
        for (lo, hi), block in zip(self.spans[1:], self.blocks[1:], strict=True):
            out.addmm_(x[:, lo:hi], block)
        return out

    def multiply_add(self, x: Tensor, total: Tensor) -> None:
        """Add the product of x (R, in) to the float32 ``total`` (R, out)."""
        if self.packed or self.dtype != total.dtype:
            total.add_(self(x))
            return
        for (lo, hi), block in zip(self.spans, self.blocks, strict=True):
            total.addmm_(x[:, lo:hi], block)
        if self.bias is not None:
            total.add_(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product of x (R, in) as a new tensor (R, out)."""
        if self.packed:
            parts = zip(self.spans, self.blocks, strict=True)
            (lo, hi), first = next(parts)
            out = _packed_product(x[:, lo:hi], first, self.bias)
            for (lo, hi), block in parts:
                out += _packed_product(x[:, lo:hi], block, None)
            return out
        return self.multiply_into(x, x.new_empty(x.shape[0], self.out_features))


class Scratch:
    """Reused buffers by name: on a CPU, page faults of new memory cost as much as the products."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the buffer ``name`` in this shape, uninitialised; one use of a name at a time."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, device=self.device, dtype=dtype)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(*shape)


def swiglu_(gate_up: Tensor) -> Tensor:
    """Compute ``silu(gate) * up`` over (R, 2 ff) in place; return the gate half."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.device.type != "cpu":
        return F.silu(gate, inplace=True).mul_(up)
    # A CPU kernel that runs on several threads ends each thread's share with scalar code, whose exp
    # differs from the vector code's. Pieces small enough for one thread avoid that.
    rows = max(1, _SERIAL_ELEMENTS // gate.shape[-1])
    for gate_rows, up_rows in zip(gate.split(rows), up.split(rows), strict=True):
        F.silu(gate_rows, inplace=True).mul_(up_rows)
    return gate


def find_batch_invariant_limits(shapes: Iterable[tuple[int, int]]) -> BatchInvariantLimits:
    """Return the least restrictive limits that hold on this CPU for these (in, out) shapes.

    Tested on random float32 rows from a fixed seed. If none holds, which has not been seen on any
    CPU so far, warn and return the strictest.
    """
    distinct = sorted(set(shapes))
    for limits in _CANDIDATES:
        if limits.packed and not can_pack():
            continue
        if all(_is_batch_invariant(limits, inner, outer) for inner, outer in distinct):
            return limits
    warnings.warn(
        "this CPU's matrix products depend on the batch: in another batch, the paths of a series "
        "may differ by rounding",
        stacklevel=2,
    )
    return _CANDIDATES[-1]


def _pack(weight: Tensor) -> Tensor:
    """Convert (out, in) to oneDNN's packed layout."""
    packed: Tensor = _ONEDNN._reorder_linear_weight(weight.contiguous())  # noqa: SLF001
    return packed


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _ONEDNN._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: SLF001
    return out


def can_pack() -> bool:
    """Return whether this torch has oneDNN and its operations on packed weights."""
    return torch.backends.mkldnn.is_available() and hasattr(_ONEDNN, "_linear_pointwise")


def _is_batch_invariant(limits: BatchInvariantLimits, inner: int, outer: int) -> bool:
    generator = torch.Generator().manual_seed(inner * 65537 + outer)
    weight = torch.randn(outer, inner, generator=generator)
    bias = torch.randn(outer, generator=generator)
    dense = Dense(weight, bias, device=torch.device("cpu"), dtype=torch.float32, limits=limits)
    x = torch.randn(max(_BATCHES), inner, generator=generator)
    probe = x[:_PROBE_ROWS]
    want = dense(probe)
    for rows in range(limits.rows, _PROBE_ROWS):
        if not torch.equal(dense(probe[:rows]), want[:rows]):
            return False
    for rows in _BATCHES:
        # The probe rows are last and, in large batches, also first.
        got = dense(torch.cat((x[: rows - _PROBE_ROWS], probe)))
        if not torch.equal(got[-_PROBE_ROWS:], want):
            return False
        if rows >= 2 * _PROBE_ROWS and not torch.equal(got[:_PROBE_ROWS], want):
            return False
    return True
