"""Inference weights, folded and fused from the two networks once, at load time.

* Token embedding and fusion are linear, so each level's embedding table is multiplied once by its
  half of the fusion: an input is the sum of two rows and a time embedding. The same applies to the
  input of the tokenizer's decoder.
* The s2 query depends only on s1, so it is also a table.
* q, k and v are one product, w1 and w3 another; the softmax scale is part of the q weights.
* The heads are always float32: rounding their logits to bf16 would flip twice as many tokens.
* Rows of q and k are reordered so that rotary pairs are adjacent: one complex multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kronos_stream.engine.dense import (
    ROW_BY_ROW,
    BatchInvariantLimits,
    Dense,
    find_batch_invariant_limits,
)
from kronos_stream.model.config import S2_HEADS
from kronos_stream.model.layers import ROPE_BASE, Attention, Block
from kronos_stream.model.predictor import STAMP_SIZES, Predictor
from kronos_stream.model.tokenizer import Tokenizer, unpack_bits

_Model = TypeVar("_Model", Predictor, Tokenizer)


class Placement(NamedTuple):
    """Device, number format and batch-invariance limits of the products."""

    device: torch.device
    dtype: torch.dtype
    limits: BatchInvariantLimits

    def dense(self, weight: Tensor, bias: Tensor | None = None) -> Dense:
        return Dense(weight, bias, device=self.device, dtype=self.dtype, limits=self.limits)

    def table(self, values: Tensor) -> Tensor:
        """Convert to a float32 table, so that sums over it are float32."""
        return values.detach().float().contiguous().to(self.device)


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One transformer block."""

    norm1: Tensor  # (d,)
    qkv: Dense  # d -> 3 d
    out: Dense  # d -> d
    norm2: Tensor  # (d,)
    gate_up: Dense  # d -> 2 ff
    down: Dense  # ff -> d


@dataclass(frozen=True, slots=True)
class Stack:
    """A causal stack of blocks of one width."""

    blocks: tuple[BlockWeights, ...]
    heads: int
    width: int
    rotation: Tensor  # (max positions, head_dim / 2) complex64

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, slots=True)
class PredictorWeights:
    """Folded weights of the predictor."""

    stack: Stack
    s1_table: Tensor  # (V1, d): share of the fused token embedding, with bias
    s2_table: Tensor  # (V2, d)
    time_tables: tuple[Tensor, ...]  # five of (rows, d)
    norm: Tensor  # (d,)
    s1_head: Dense  # d -> V1, float32
    s2_query: Tensor  # (V1, d), scaled
    s2_key_value: Dense  # d -> 2 d
    s2_out: Dense  # d -> d
    s2_norm: Tensor  # (d,)
    s2_head: Dense  # d -> V2, float32
    min_rows: int  # minimum number of rows of a step; fewer are padded

    def time_embedding(self, stamps: Tensor) -> Tensor:
        """Embed stamps (..., 5) int64 as (..., d) float32."""
        columns = zip(self.time_tables, stamps.unbind(-1), strict=True)
        return torch.stack([table[column] for table, column in columns]).sum(0)


@dataclass(frozen=True, slots=True)
class TokenizerWeights:
    """Folded weights of the tokenizer; the encoder is always float32, since its output is signs."""

    encoder: Stack
    embed: Dense  # 6 -> d
    code: Dense  # d -> bits
    s1_bits: int
    decoder: Stack
    s1_table: Tensor  # (2^s1_bits, d), with bias
    s2_table: Tensor  # (2^s2_bits, d)
    head: Dense  # d -> 6


def fold_predictor(
    model: Predictor, device: torch.device, dtype: torch.dtype, positions: int
) -> PredictorWeights:
    """Fold a predictor for contexts of up to ``positions`` bars."""
    model = _on_cpu(model)
    at = _placement(device, dtype, (model,))
    exact = at._replace(dtype=torch.float32)
    embedding, attention = model.embedding, model.dep_layer.cross_attn
    width = model.config.d_model
    fuse1, fuse2 = (embedding.fusion_proj.weight.double() * embedding.scale).split(width, dim=1)
    query = _scaled(attention.q_proj, (width // S2_HEADS) ** -0.5)
    return PredictorWeights(
        stack=_stack(model.transformer, model.config.n_heads, at, positions),
        s1_table=at.table(
            embedding.emb_s1.weight.double() @ fuse1.T + embedding.fusion_proj.bias.double()
        ),
        s2_table=at.table(embedding.emb_s2.weight.double() @ fuse2.T),
        time_tables=tuple(
            at.table(model.time_emb.get_parameter(f"{name}_embed.weight")) for name in STAMP_SIZES
        ),
        norm=at.table(model.norm.weight),
        s1_head=exact.dense(model.head.proj_s1.weight, model.head.proj_s1.bias),
        s2_query=at.table(embedding.emb_s1.weight.double() @ query[0].T + query[1]).to(dtype),
        s2_key_value=at.dense(
            torch.cat((attention.k_proj.weight, attention.v_proj.weight)),
            torch.cat((attention.k_proj.bias, attention.v_proj.bias)),
        ),
        s2_out=at.dense(attention.out_proj.weight, attention.out_proj.bias),
        s2_norm=at.table(model.dep_layer.norm.weight),
        s2_head=exact.dense(model.head.proj_s2.weight, model.head.proj_s2.bias),
        min_rows=at.limits.rows,
    )


def fold_tokenizer(
    model: Tokenizer, device: torch.device, dtype: torch.dtype, positions: int
) -> TokenizerWeights:
    """Fold a tokenizer; ``dtype`` applies to the decoder, the encoder is float32."""
    model = _on_cpu(model)
    exact = _placement(device, torch.float32, (model,))
    at = _placement(device, dtype, (model,))
    c = model.config
    code = model.post_quant_embed.weight.double() * c.code_bits**-0.5
    code1, code2 = code.split((c.s1_bits, c.s2_bits), dim=1)
    return TokenizerWeights(
        encoder=_stack(model.encoder, c.n_heads, exact, positions),
        embed=exact.dense(model.embed.weight, model.embed.bias),
        code=exact.dense(model.quant_embed.weight, model.quant_embed.bias),
        s1_bits=c.s1_bits,
        decoder=_stack(model.decoder, c.n_heads, at, positions),
        s1_table=at.table(_signs(c.s1_bits) @ code1.T + model.post_quant_embed.bias.double()),
        s2_table=at.table(_signs(c.s2_bits) @ code2.T),
        head=exact.dense(model.head.weight, model.head.bias),
    )


def rotation_table(head_dim: int, positions: int) -> Tensor:
    """Unit complex numbers (positions, head_dim / 2): angle position / base^(2i / head_dim)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.arange(positions).float()[:, None] * (1.0 / ROPE_BASE**exponent)
    return torch.polar(torch.ones_like(angles), angles)


def _on_cpu(model: _Model) -> _Model:
    """Return ``model`` on the CPU, copied if necessary: folding uses float64, which MPS lacks."""
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        return model
    return deepcopy(model).cpu()


def _placement(device: torch.device, dtype: torch.dtype, models: Sequence[nn.Module]) -> Placement:
    if device.type != "cpu" or dtype != torch.float32:
        return Placement(device, dtype, ROW_BY_ROW)
    return Placement(device, dtype, find_batch_invariant_limits(_product_shapes(models)))


def _product_shapes(models: Sequence[nn.Module]) -> set[tuple[int, int]]:
    """Return (in, out) of the fused products."""
    shapes = set()
    for module in (m for model in models for m in model.modules()):
        if isinstance(module, Block):
            ff, width = module.ffn.w1.weight.shape
            shapes |= {(width, 3 * width), (width, width), (width, 2 * ff), (ff, width)}
        elif isinstance(module, Attention):
            shapes.add((module.q_proj.in_features, 2 * module.q_proj.in_features))
        elif isinstance(module, nn.Linear):
            shapes.add((module.in_features, module.out_features))
    return shapes


def _stack(blocks: nn.ModuleList, heads: int, at: Placement, positions: int) -> Stack:
    folded = tuple(_block(block, at) for block in blocks if isinstance(block, Block))
    width = len(folded[0].norm1)
    rotation = rotation_table(width // heads, positions).to(at.device)
    return Stack(folded, heads, width, rotation)


def _block(block: Block, at: Placement) -> BlockWeights:
    attention = block.self_attn
    head_dim = attention.q_proj.out_features // attention.n_heads
    q, q_bias = _scaled(attention.q_proj, head_dim**-0.5)
    weights = (
        _pair_up(q.float(), attention.n_heads),
        _pair_up(attention.k_proj.weight, attention.n_heads),
        attention.v_proj.weight,
    )
    biases = (
        _pair_up(q_bias.float(), attention.n_heads),
        _pair_up(attention.k_proj.bias, attention.n_heads),
        attention.v_proj.bias,
    )
    return BlockWeights(
        norm1=at.table(block.norm1.weight),
        qkv=at.dense(torch.cat(weights), torch.cat(biases)),
        out=at.dense(attention.out_proj.weight, attention.out_proj.bias),
        norm2=at.table(block.norm2.weight),
        gate_up=at.dense(torch.cat((block.ffn.w1.weight, block.ffn.w3.weight))),
        down=at.dense(block.ffn.w2.weight),
    )


def _scaled(layer: nn.Linear, scale: float) -> tuple[Tensor, Tensor]:
    return layer.weight.double() * scale, layer.bias.double() * scale


def _pair_up(rows: Tensor, heads: int) -> Tensor:
    """Reorder the halves (x1, x2) of each head to pairs: (h 2 i, ...) to (h i 2, ...)."""
    pairs: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return pairs.flatten(0, 2)


def _signs(bits: int) -> Tensor:
    """Return every code of ``bits`` bits as +-1: (2^bits, bits)."""
    return (unpack_bits(torch.arange(2**bits), bits) * 2 - 1).double()
