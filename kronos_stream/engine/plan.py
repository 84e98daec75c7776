"""Call planning: chunks of contexts, sized to the memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import torch

from kronos_stream.engine.context import PreparedContext
from kronos_stream.model.config import PredictorConfig, TokenizerConfig


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Memory use in bytes, derived from the model's sizes."""

    per_bar: int
    """Cached keys and values of one context bar."""
    per_step: int
    """Cached keys and values of one drawn bar of one path."""
    per_row: int
    """Activations of one path in a step."""

    @classmethod
    def for_model(
        cls, p: PredictorConfig, t: TokenizerConfig, dtype: torch.dtype, positions: int
    ) -> Self:
        """Sizes for caches of ``dtype`` and windows of up to ``positions`` bars."""
        item = dtype.itemsize
        step = 2 * (p.n_layers + 1) * p.d_model * item
        scores = 3 * p.n_heads * positions * item
        logits = 6 * 2 ** max(p.s1_bits, p.s2_bits) * 4
        return cls(
            per_bar=step + 2 * (t.n_dec_layers - 1) * t.d_model * item,
            per_step=step,
            per_row=(6 * p.d_model + 2 * p.ff_dim) * item + scores + logits,
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a group: contexts of equal padded length and horizon, and paths per slice."""

    bars: int
    horizon: int
    contexts: int
    paths: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Groups computed together, longest horizon first; ``members`` are indices into the call."""

    shapes: tuple[Shape, ...]
    members: tuple[tuple[int, ...], ...]
    slices: int
    """Number of slices of ``shapes[0].paths`` paths, drawn one after the other over one prefix."""


@dataclass(frozen=True, slots=True)
class Planner:
    """Splits a call into chunks.

    bucket: each context is padded to a multiple of this many bars.
    budget: limit of a chunk in bytes, without the weights.
    pad_contexts: round a group's context count up, so that there are few shapes (CUDA graphs).
    """

    sizes: MemorySizes
    bucket: int
    budget: int
    pad_contexts: bool

    def chunks(self, prepared: Sequence[PreparedContext], paths: int) -> list[Chunk]:
        """Assign every context to exactly one chunk."""
        order = sorted(range(len(prepared)), key=lambda i: self._group(prepared[i]))
        chunks: list[Chunk] = []
        for per_slice, members in groupby(order, lambda i: self._slice(prepared[i], paths)):
            own = list(members)
            costs = [self._cost(prepared[i], per_slice) for i in own]
            chunks.extend(
                self._chunk(prepared, own[first:last], paths, per_slice)
                for first, last in _split(costs, self.budget)
            )
        return chunks

    def padded(self, length: int) -> int:
        """Round ``length`` up to the bucket."""
        return -(-length // self.bucket) * self.bucket

    def cost(self, shapes: Sequence[Shape]) -> int:
        """Memory of groups of these shapes, in bytes."""
        return sum(
            s.contexts * (s.bars * self.sizes.per_bar + s.paths * self._row(s.horizon))
            for s in shapes
        )

    def _row(self, horizon: int) -> int:
        return horizon * self.sizes.per_step + self.sizes.per_row

    def _group(self, item: PreparedContext) -> tuple[int, int]:
        return -item.horizon, self.padded(item.length)

    def _cost(self, item: PreparedContext, per_slice: int) -> int:
        return self.cost([Shape(self.padded(item.length), item.horizon, 1, per_slice)])

    def _slice(self, item: PreparedContext, paths: int) -> int:
        """Paths per slice; depends only on this context's horizon, not on the batch."""
        most = max(1, self.budget // 4 // self._row(item.horizon))
        return -(-paths // -(-paths // most))

    def _chunk(
        self, prepared: Sequence[PreparedContext], chunk: list[int], paths: int, per_slice: int
    ) -> Chunk:
        groups = [
            (key, tuple(members))
            for key, members in groupby(chunk, lambda i: self._group(prepared[i]))
        ]
        shapes = tuple(
            Shape(bars, -negative_horizon, self._count(len(members)), per_slice)
            for (negative_horizon, bars), members in groups
        )
        return Chunk(shapes, tuple(m for _, m in groups), -(-paths // per_slice))

    def _count(self, contexts: int) -> int:
        if not self.pad_contexts or contexts <= 8:
            return contexts
        # To a multiple of an eighth of the next power of two, which adds less than a quarter.
        unit = 1 << (contexts - 1).bit_length() - 3
        return -(-contexts // unit) * unit


def _split(costs: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Split neighbours into as few and as even spans as the budget allows.

    Even chunks of similar contexts have the same shape and share their buffers.
    """
    fewest = len(_spans(costs, budget))
    return _spans(costs, min(budget, -(-sum(costs) // fewest) + max(costs) - 1))


def _spans(costs: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Fill spans one after the other; an item that exceeds the limit gets its own span."""
    spans: list[tuple[int, int]] = []
    first, used = 0, 0
    for i, cost in enumerate(costs):
        if i > first and used + cost > limit:
            spans.append((first, i))
            first, used = i, 0
        used += cost
    return [*spans, (first, len(costs))]
