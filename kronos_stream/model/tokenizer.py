"""Tokenizer: a causal autoencoder whose bottleneck is one sign per bit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronos_stream.model.config import TokenizerConfig
from kronos_stream.model.layers import Block


class TokenizerOutput(NamedTuple):
    """Results of a training pass; shapes (B, S, ...)."""

    coarse: Tensor
    """Candles from the s1 bits alone, (B, S, d_in)."""
    full: Tensor
    """Candles from all bits, (B, S, d_in)."""
    unit: Tensor
    """The code before quantisation, on the unit sphere, (B, S, bits)."""
    quantised: Tensor
    """The code as +-1/sqrt(bits), with a straight-through gradient, (B, S, bits)."""


class BinaryQuantiser(nn.Module):
    """Two constant buffers, unused, that published checkpoints contain."""

    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__()
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("group_basis", 2 ** torch.arange(group_size - 1, -1, -1))


class Tokenizer(nn.Module):
    """Converts normalised candles to token pairs and back. Encoder and decoder are causal."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = c = config

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(
                    c.d_model,
                    c.n_heads,
                    c.ff_dim,
                    ffn_dropout=c.ffn_dropout_p,
                    attn_dropout=c.attn_dropout_p,
                    resid_dropout=c.resid_dropout_p,
                )
                for _ in range(count)
            )

        self.embed = nn.Linear(c.d_in, c.d_model)
        self.encoder = blocks(c.n_enc_layers - 1)
        self.quant_embed = nn.Linear(c.d_model, c.code_bits)
        self.post_quant_embed_pre = nn.Linear(c.s1_bits, c.d_model)
        self.post_quant_embed = nn.Linear(c.code_bits, c.d_model)
        self.decoder = blocks(c.n_dec_layers - 1)
        self.head = nn.Linear(c.d_model, c.d_in)
        # Named so that state dicts match the published ones: "tokenizer.bsq.basis".
        self.tokenizer = nn.ModuleDict({"bsq": BinaryQuantiser(c.code_bits, c.group_size)})

    def unit_code(self, x: Tensor) -> Tensor:
        """Encode normalised candles (B, S, d_in) on the unit sphere (B, S, bits)."""
        z = self.embed(x)
        for block in self.encoder:
            z = block(z)
        return F.normalize(self.quant_embed(z), dim=-1)

    def tokenise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised candles (B, S, d_in) to int64 tokens s1, s2, each (B, S)."""
        bits = self.unit_code(x) > 0
        return (
            pack_bits(bits[..., : self.config.s1_bits]),
            pack_bits(bits[..., self.config.s1_bits :]),
        )

    def detokenise(self, s1: Tensor, s2: Tensor) -> Tensor:
        """Decode tokens, each (B, S), to normalised candles (B, S, d_in)."""
        return self.decode_code(self.code(s1, s2))

    def code(self, s1: Tensor, s2: Tensor) -> Tensor:
        """Convert tokens, each (...), to the quantised code (..., bits) of +-1/sqrt(bits)."""
        c = self.config
        bits = torch.cat((unpack_bits(s1, c.s1_bits), unpack_bits(s2, c.s2_bits)), dim=-1)
        signs = bits.to(self.head.weight.dtype) * 2 - 1
        out: Tensor = signs * c.code_bits**-0.5
        return out

    def decode_code(self, code: Tensor) -> Tensor:
        """Decode a full (B, S, bits) or a coarse (B, S, s1_bits) code."""
        coarse = code.shape[-1] == self.config.s1_bits
        z = self.post_quant_embed_pre(code) if coarse else self.post_quant_embed(code)
        for block in self.decoder:
            z = block(z)
        out: Tensor = self.head(z)
        return out

    def forward(self, x: Tensor) -> TokenizerOutput:
        """Run the training pass over normalised candles (B, S, d_in)."""
        unit = self.unit_code(x)
        signs = torch.where(unit > 0, 1.0, -1.0).type_as(unit)
        # As in the reference, scaled after the straight-through step, which scales the gradient.
        quantised = (unit + (signs - unit).detach()) * unit.shape[-1] ** -0.5
        coarse = self.decode_code(quantised[..., : self.config.s1_bits])
        return TokenizerOutput(coarse, self.decode_code(quantised), unit, quantised)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans (..., n) to int64 (...): bit j has the value 2^j."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def unpack_bits(index: Tensor, n: int) -> Tensor:
    """Unpack int64 (...) to 0/1 int64 (..., n): the inverse of :func:`pack_bits`."""
    return (index[..., None] >> torch.arange(n, device=index.device)) & 1
