"""Attention of many paths over one shared prefix and the suffix of each path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kronos_stream.engine.dense import Scratch


@dataclass(frozen=True, slots=True)
class PrefixKeyValues:
    """Keys and values of a context's own bars, for B contexts, in one layer.

    Keys are stored transposed: the score product of many queries reads this layout fastest.
    """

    keys: Tensor  # (B, heads, head_dim, L)
    values: Tensor  # (B, heads, L, head_dim)
    mask: Tensor | None  # (B, 1, 1, L): -inf past each context's length; None when all are full


@dataclass(frozen=True, slots=True)
class SuffixKeyValues:
    """Keys and values of the bars that each path has drawn, in one layer."""

    keys: Tensor  # (B * P, heads, T, head_dim)
    values: Tensor  # (B * P, heads, T, head_dim)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (..., head_dim) by ``rotation`` (..., head_dim / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def attend(
    query: Tensor,
    prefix: PrefixKeyValues,
    suffix: SuffixKeyValues | None,
    out: Tensor,
    scratch: Scratch,
) -> None:
    """Attend with one softmax to the shared prefix and the own suffix, for all paths of B contexts.

    query: (B, P, Q, heads, head_dim), scaled; query i of a path sees entries 0 to
        T - Q + i of its suffix.
    out: (B * P * Q, heads * head_dim), overwritten.
    """
    b, p, q, heads, width = query.shape
    length = prefix.keys.shape[-1]
    shared = query.permute(0, 3, 1, 2, 4).reshape(b * heads, p * q, width)
    scores = scratch("scores", (b * heads, p * q, length), query.dtype)
    torch.bmm(shared, prefix.keys.flatten(0, 1), out=scores)
    if prefix.mask is not None:
        scores.view(b, heads, p * q, length).add_(prefix.mask)
    mixed = out.view(b, p, q, heads, width)
    if suffix is None:
        weights = torch.softmax(scores, dim=-1)
        mixed.copy_(_shared_values(weights, prefix, query))
        return
    steps = suffix.keys.shape[-2]
    own = query.transpose(2, 3).reshape(b * p * heads, q, width)
    own_scores = torch.bmm(own, suffix.keys.flatten(0, 1).transpose(1, 2))  # (B P h, Q, T)
    if q > 1:
        future = torch.ones(q, steps, dtype=torch.bool, device=query.device).triu(steps - q + 1)
        own_scores.masked_fill_(future, float("-inf"))
    own_scores = own_scores.view(b, p, heads, q, steps).transpose(1, 2)
    both = scratch("both", (b, heads, p, q, length + steps), query.dtype)
    torch.cat((scores.view(b, heads, p, q, length), own_scores), dim=-1, out=both)
    # The scores have been copied to ``both``, so their buffer is free for the weights.
    weights = torch.softmax(both, dim=-1, out=scratch("scores", both.shape, query.dtype))
    weights = weights.view(b * heads, p * q, length + steps)
    own_weights = weights[..., length:].view(b, heads, p, q, steps).transpose(1, 2)
    from_own = torch.bmm(
        own_weights.reshape(b * p * heads, q, steps), suffix.values.flatten(0, 1)
    ).view(b, p, heads, q, width)
    torch.add(
        _shared_values(weights[..., :length], prefix, query), from_own.transpose(2, 3), out=mixed
    )


def _shared_values(weights: Tensor, prefix: PrefixKeyValues, query: Tensor) -> Tensor:
    """Mix the prefix's values: (B h, P Q, L) to (B, P, Q, heads, head_dim)."""
    b, p, q, heads, width = query.shape
    mixed = torch.bmm(weights, prefix.values.flatten(0, 1))
    return mixed.view(b, heads, p, q, width).permute(0, 2, 3, 1, 4)
