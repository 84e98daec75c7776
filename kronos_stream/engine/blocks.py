"""Execution of a stack of blocks: over whole prefixes at once, or over each path's newest rows.

The residual stream is float32 even if the products are bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kronos_stream.engine.attention import PrefixKeyValues, SuffixKeyValues, attend, rotate
from kronos_stream.engine.dense import Scratch, swiglu_
from kronos_stream.engine.weights import BlockWeights, Stack
from kronos_stream.model.layers import NORM_EPS


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of several layers: layers, then as in PrefixKeyValues or SuffixKeyValues."""

    keys: Tensor
    values: Tensor


def rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """RMSNorm of float32 rows (R, d), returned in the type of the next product."""
    # Takes half the time of F.rms_norm on a CPU, which uses more and larger steps.
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale.square_().add_(NORM_EPS * x.shape[-1]).rsqrt_().mul_(x.shape[-1] ** 0.5)
    normed: Tensor = (x * scale).mul_(weight)
    return normed.to(dtype)


def run_prefix(
    stack: Stack,
    x: Tensor,
    batch: int,
    scratch: Scratch,
    cache: LayerCache | None = None,
    *,
    last_at: Tensor | None = None,
) -> Tensor:
    """Run a causal pass over whole windows, x (B * L, d) float32, changed in place and returned.

    cache: filled with every layer's keys (layers, B, heads, head_dim, L) and values (layers, B,
        heads, L, head_dim).
    last_at: (B,) positions; if given, the last block returns only these rows, (B, d), and computes
        for the other rows only what the cache needs.
    """
    length = x.shape[0] // batch
    rotation = stack.rotation[:length, None, None]  # (L, 1, 1, head_dim / 2)
    for i, block in enumerate(stack.blocks):
        q, k, v = _project(block, stack, x, rotation, scratch, (batch, length))
        if cache is not None:
            cache.keys[i].copy_(k.permute(0, 2, 3, 1))
            cache.values[i].copy_(v.transpose(1, 2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if last_at is not None and block is stack.blocks[-1]:
            row = torch.arange(batch, device=x.device)
            q = q[row, :, last_at][:, :, None]
            x = x.view(batch, length, -1)[row, last_at]
            seen = torch.arange(length, device=x.device) <= last_at[:, None]
            mixed = F.scaled_dot_product_attention(q, k, v, seen[:, None, None], scale=1.0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        block.out.multiply_add(mixed.transpose(1, 2).reshape(len(x), -1), x)
        _feed_forward(block, x, scratch)
    return x


@dataclass(frozen=True, slots=True)
class PathRows:
    """Consecutive rows of a step: the paths of contexts that share a shape."""

    rows: slice
    shape: tuple[int, int, int]  # (B, P, Q): contexts, paths, new bars per path
    prefix: LayerCache
    mask: Tensor | None
    suffix: LayerCache  # (layers, B * P, heads, T, head_dim)

    def write(self, i: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (rows, heads, head_dim), at ``start`` of layer i's suffix."""
        b, p, q = self.shape
        for cached, new in ((self.suffix.keys, keys), (self.suffix.values, values)):
            own = new[self.rows].unflatten(0, (b * p, q)).transpose(1, 2)
            cached[i, :, :, start : start + q].copy_(own)

    def attend(self, i: int, end: int, query: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Attend from these rows of query (R, heads, head_dim) to the suffix before ``end``."""
        prefix = PrefixKeyValues(self.prefix.keys[i], self.prefix.values[i], self.mask)
        suffix = None
        if end > 0:
            suffix = SuffixKeyValues(
                self.suffix.keys[i, :, :, :end], self.suffix.values[i, :, :, :end]
            )
        own = query[self.rows].unflatten(0, self.shape)
        attend(own, prefix, suffix, out[self.rows], scratch)


def attend_all(
    groups: Sequence[PathRows], i: int, end: int, query: Tensor, scratch: Scratch
) -> Tensor:
    """Attention of every group's rows in layer i: (R, heads, head_dim) to (R, d).

    Rows that belong to no group are padding; they are set to 0 to stay finite.
    """
    out = scratch("mixed", (len(query), query.shape[1] * query.shape[2]), query.dtype)
    for group in groups:
        group.attend(i, end, query, out, scratch)
    out[groups[-1].rows.stop :].zero_()
    return out


def run_rows(
    stack: Stack,
    x: Tensor,
    rotation: Tensor,
    groups: Sequence[PathRows],
    start: int,
    scratch: Scratch,
) -> Tensor:
    """Run the newest rows of every path, x (R, d) float32, changed in place and returned.

    rotation: (R, 1, 1, head_dim / 2). start: bars of each path that the suffix
    caches hold already; these rows are added to the caches.
    """
    for i, block in enumerate(stack.blocks):
        q, k, v = _project(block, stack, x, rotation, scratch, (len(x),))
        for group in groups:
            group.write(i, start, k, v)
        mixed = attend_all(groups, i, start + groups[0].shape[2], q, scratch)
        block.out.multiply_add(mixed, x)
        _feed_forward(block, x, scratch)
    return x


def _project(
    block: BlockWeights,
    stack: Stack,
    x: Tensor,
    rotation: Tensor,
    scratch: Scratch,
    lead: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of rows x: each (*lead, heads, head_dim)."""
    normed = rms_norm(x, block.norm1, block.qkv.dtype)
    qkv = block.qkv.multiply_into(
        normed, scratch("qkv", (len(x), 3 * stack.width), block.qkv.dtype)
    )
    qkv = qkv.view(*lead, 3, stack.heads, stack.head_dim)
    q, k = rotate(qkv[..., :2, :, :], rotation).unbind(-3)
    return q, k, qkv[..., 2, :, :]


def _feed_forward(block: BlockWeights, x: Tensor, scratch: Scratch) -> None:
    normed = rms_norm(x, block.norm2, block.gate_up.dtype)
    dense = block.gate_up
    gate_up = dense.multiply_into(
        normed, scratch("gate_up", (len(x), dense.out_features), dense.dtype)
    )
    block.down.multiply_add(swiglu_(gate_up), x)
