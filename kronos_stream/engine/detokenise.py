"""Detokenisation: the tokenizer's decoder over the new bars only."""

from __future__ import annotations

import torch
from torch import Tensor

from kronos_stream.engine.blocks import LayerCache, PathRows, run_rows
from kronos_stream.engine.dense import Scratch
from kronos_stream.engine.prefix import ContextPrefix
from kronos_stream.engine.weights import TokenizerWeights


def detokenise(
    weights: TokenizerWeights,
    prefix: ContextPrefix,
    tokens: Tensor,
    rows_at_once: int,
    scratch: Scratch,
) -> Tensor:
    """Decode the tokens (B, P, H, 2) of B contexts to normalised candles (B, P, H, 6) float32.

    rows_at_once: approximate number of bars decoded together. Small contexts are grouped; the paths
    of a large context are split into equal pieces.
    """
    contexts, paths, horizon, _ = tokens.shape
    at_once = max(1, rows_at_once // (paths * horizon))
    pieces = -(-paths * horizon // rows_at_once) if at_once == 1 else 1
    paths_at_once = -(-paths // pieces)
    out = torch.empty(contexts, paths, horizon, 6, device=tokens.device)
    for first in range(0, contexts, at_once):
        for path in range(0, paths, paths_at_once):
            # The prefix may have unused slots after the last context.
            slots = slice(first, min(first + at_once, contexts))
            own = slots, slice(path, path + paths_at_once)
            out[own] = _decode(weights, prefix, slots, tokens[own], scratch)
    return out


def _decode(
    weights: TokenizerWeights, prefix: ContextPrefix, slots: slice, tokens: Tensor, scratch: Scratch
) -> Tensor:
    b, p, q, _ = tokens.shape
    stack, cached = weights.decoder, prefix.decoder
    s1, s2 = tokens.flatten(0, 2).unbind(-1)
    x = weights.s1_table[s1] + weights.s2_table[s2]  # (B P H, d)
    positions = prefix.lengths[slots, None] + torch.arange(q, device=x.device)  # (B, H)
    rotation = stack.rotation[positions][:, None].expand(b, p, q, -1).reshape(len(x), 1, 1, -1)
    suffix_shape = (len(stack.blocks), b * p, stack.heads, q, stack.head_dim)
    rows = PathRows(
        rows=slice(0, len(x)),
        shape=(b, p, q),
        prefix=LayerCache(cached.keys[:, slots], cached.values[:, slots]),
        mask=prefix.bias[slots],
        suffix=LayerCache(cached.keys.new_empty(suffix_shape), cached.keys.new_empty(suffix_shape)),
    )
    run_rows(stack, x, rotation, [rows], 0, scratch)
    return weights.head(x).view(b, p, q, -1)
