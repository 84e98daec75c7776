"""Context prefix: bars up to the origin, computed once per context and shared by its paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kronos_stream.channels import CLOSE
from kronos_stream.engine.blocks import LayerCache, rms_norm, run_prefix
from kronos_stream.engine.context import PreparedContext
from kronos_stream.engine.dense import Scratch
from kronos_stream.engine.plan import Shape
from kronos_stream.engine.weights import PredictorWeights, Stack, TokenizerWeights
from kronos_stream.model.config import CANDLE_CHANNELS, S2_HEADS
from kronos_stream.model.predictor import STAMP_SIZES
from kronos_stream.model.tokenizer import pack_bits

Stage = Literal["encode", "prefill", "decode", "detokenise", "done"]
"""Stages of a call, in order; "detokenise" includes the prefix of the tokenizer's decoder."""


@dataclass(slots=True)
class ContextPrefix:
    """Buffers for B contexts of one shape; overwritten by :meth:`fill`."""

    bars: int
    trunk: LayerCache  # (layers, B, heads, ...), see PrefixKeyValues
    s2: LayerCache  # (1, B, S2_HEADS, ...)
    decoder: LayerCache  # (layers, B, heads, ...)
    lengths: Tensor  # (B,) int64
    bias: Tensor  # (B, 1, 1, L): 0, and -inf past each context's length
    hidden: Tensor  # (B, d) float32: the trunk's state at the origin
    time_embedding: Tensor  # (horizon, B, d) float32, of the bars to draw
    origin_close: Tensor  # (B,) normalised close of the origin after encoding and decoding
    full: bool = False  # no context is padded, so the bias is 0 everywhere

    @classmethod
    def empty(
        cls, shape: Shape, predictor: PredictorWeights, tokenizer: TokenizerWeights
    ) -> ContextPrefix:
        """Allocate buffers for ``shape``; unused context slots attend to zeros."""
        like, bars, count = predictor.s2_query, shape.bars, shape.contexts
        width = predictor.stack.width
        code_like = like.new_empty(0, dtype=tokenizer.decoder.blocks[0].qkv.dtype)
        return cls(
            bars=bars,
            trunk=_cache(predictor.stack, count, bars, like),
            s2=LayerCache(
                like.new_zeros(1, count, S2_HEADS, width // S2_HEADS, bars),
                like.new_zeros(1, count, S2_HEADS, bars, width // S2_HEADS),
            ),
            decoder=_cache(tokenizer.decoder, count, bars, code_like),
            lengths=torch.full((count,), bars, device=like.device),
            bias=torch.zeros(count, 1, 1, bars, device=like.device, dtype=like.dtype),
            hidden=torch.zeros(count, width, device=like.device),
            time_embedding=torch.zeros(shape.horizon, count, width, device=like.device),
            origin_close=torch.ones(count, device=like.device),
        )

    def fill(
        self,
        contexts: Sequence[PreparedContext],
        predictor: PredictorWeights,
        tokenizer: TokenizerWeights,
        at_once: int,
        scratch: Scratch,
        on_stage: Callable[[Stage], None],
    ) -> None:
        """Tokenise and prefill ``contexts`` into the first slots, ``at_once`` at a time."""
        self.full = all(context.length == self.bars for context in contexts)
        for first in range(0, len(contexts), at_once):
            part = contexts[first : first + at_once]
            slots = slice(first, first + len(part))
            self._fill_slots(part, slots, predictor, tokenizer, scratch, on_stage)

    def _fill_slots(
        self,
        contexts: Sequence[PreparedContext],
        slots: slice,
        predictor: PredictorWeights,
        tokenizer: TokenizerWeights,
        scratch: Scratch,
        on_stage: Callable[[Stage], None],
    ) -> None:
        on_stage("encode")
        device = self.hidden.device
        candles, stamps, future = _stack_inputs(contexts, self.bars, self.time_embedding.shape[0])
        lengths = torch.tensor([c.length for c in contexts], device=device)
        self.lengths[slots] = lengths
        past = torch.arange(self.bars, device=device) >= lengths[:, None]
        self.bias[slots, 0, 0] = torch.where(past, float("-inf"), 0.0).to(self.bias.dtype)
        self.time_embedding[:, slots] = predictor.time_embedding(future.to(device)).transpose(0, 1)
        s1, s2 = encode(tokenizer, candles.to(device), scratch)
        on_stage("prefill")
        self._prefill_trunk(s1, s2, stamps.to(device), slots, lengths - 1, predictor, scratch)
        on_stage("detokenise")
        self._prefill_decoder(s1, s2, slots, lengths - 1, tokenizer, scratch)

    def _prefill_trunk(
        self,
        s1: Tensor,
        s2: Tensor,
        stamps: Tensor,
        slots: slice,
        origins: Tensor,
        weights: PredictorWeights,
        scratch: Scratch,
    ) -> None:
        batch = len(s1)
        tokens = weights.s1_table[s1] + weights.s2_table[s2]
        x = (tokens + weights.time_embedding(stamps)).flatten(0, 1)
        run_prefix(weights.stack, x, batch, scratch, _slots(self.trunk, slots))
        normed = rms_norm(x, weights.norm, torch.float32)
        pair = weights.s2_key_value(normed.to(self.bias.dtype))
        keys, values = pair.view(batch, self.bars, 2, S2_HEADS, -1).unbind(2)
        self.s2.keys[0, slots].copy_(keys.permute(0, 2, 3, 1))
        self.s2.values[0, slots].copy_(values.transpose(1, 2))
        row = torch.arange(batch, device=x.device)
        self.hidden[slots] = normed.view(batch, self.bars, -1)[row, origins]

    def _prefill_decoder(
        self,
        s1: Tensor,
        s2: Tensor,
        slots: slice,
        origins: Tensor,
        weights: TokenizerWeights,
        scratch: Scratch,
    ) -> None:
        x = (weights.s1_table[s1] + weights.s2_table[s2]).flatten(0, 1)
        x = run_prefix(
            weights.decoder, x, len(s1), scratch, _slots(self.decoder, slots), last_at=origins
        )
        self.origin_close[slots] = weights.head(x)[:, CLOSE]


def encode(weights: TokenizerWeights, candles: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Encode normalised candles (B, L, 6) float32 to tokens s1, s2, each (B, L) int64."""
    batch, length, _ = candles.shape
    x = weights.embed(candles.flatten(0, 1))
    x = run_prefix(weights.encoder, x, batch, scratch)
    # The encoder's normalisation does not change signs, so it is left out.
    bits = weights.code(x).view(batch, length, -1) > 0
    return pack_bits(bits[..., : weights.s1_bits]), pack_bits(bits[..., weights.s1_bits :])


def _cache(stack: Stack, count: int, bars: int, like: Tensor) -> LayerCache:
    layers = len(stack.blocks)
    return LayerCache(
        like.new_zeros(layers, count, stack.heads, stack.head_dim, bars),
        like.new_zeros(layers, count, stack.heads, bars, stack.head_dim),
    )


def _slots(cache: LayerCache, slots: slice) -> LayerCache:
    return LayerCache(cache.keys[:, slots], cache.values[:, slots])


def _stack_inputs(
    contexts: Sequence[PreparedContext], bars: int, horizon: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Candles (B, bars, 6), stamps (B, bars, 5), stamps of the bars to draw (B, horizon, 5).

    Padding follows a context's last bar, where causal attention cannot see it.
    """
    candles = np.zeros((len(contexts), bars, CANDLE_CHANNELS), np.float32)
    stamps = np.zeros((len(contexts), bars, len(STAMP_SIZES)), np.int64)
    future = np.zeros((len(contexts), horizon, len(STAMP_SIZES)), np.int64)
    for i, context in enumerate(contexts):
        candles[i, : context.length] = context.normalised
        stamps[i, : context.length] = context.stamps[: context.length]
        future[i] = context.stamps[context.length :]
    return torch.from_numpy(candles), torch.from_numpy(stamps), torch.from_numpy(future)
