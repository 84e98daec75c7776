"""Predictor: a decoder over (s1, s2) token pairs, one pair per candle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kronos_stream.model.config import S2_HEADS, PredictorConfig
from kronos_stream.model.layers import Attention, Block, RMSNorm

STAMP_SIZES = {"minute": 60, "hour": 24, "weekday": 7, "day": 32, "month": 13}
"""Columns of a time stamp, in order, with the number of rows of their embedding tables."""


class TokenEmbedding(nn.Module):
    """Embeddings of both tokens, scaled by sqrt(d) and fused to one vector."""

    def __init__(self, s1_bits: int, s2_bits: int, d_model: int) -> None:
        super().__init__()
        self.emb_s1 = nn.Embedding(2**s1_bits, d_model)
        self.emb_s2 = nn.Embedding(2**s2_bits, d_model)
        self.fusion_proj = nn.Linear(2 * d_model, d_model)
        self.scale = d_model**0.5

    def forward(self, s1: Tensor, s2: Tensor) -> Tensor:
        pair = torch.cat((self.emb_s1(s1), self.emb_s2(s2)), dim=-1)
        out: Tensor = self.fusion_proj(pair * self.scale)
        return out


class TimeEmbedding(nn.Module):
    """Sum of five learned embeddings of a bar's open time."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        for name, rows in STAMP_SIZES.items():
            self.add_module(f"{name}_embed", nn.Embedding(rows, d_model))

    def forward(self, stamps: Tensor) -> Tensor:
        """Embed stamps (..., 5) int64 as (..., d)."""
        tables = (self.get_submodule(f"{name}_embed") for name in STAMP_SIZES)
        parts = [table(column) for table, column in zip(tables, stamps.unbind(-1), strict=True)]
        return torch.stack(parts).sum(0)


class DependencyLayer(nn.Module):
    """Conditions s2 on the drawn s1: E1(s1) attends to the trunk's states, then RMSNorm."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.cross_attn = Attention(d_model, S2_HEADS)
        self.norm = RMSNorm(d_model)

    def forward(self, hidden: Tensor, s1_embedded: Tensor, *, rotate: bool, causal: bool) -> Tensor:
        """Map (B, T, d) and s1_embedded (B, S, d), with S = 1 or T, to (B, T, d)."""
        attended = self.cross_attn(s1_embedded, hidden, rotate=rotate, causal=causal)
        out: Tensor = self.norm(hidden + attended)
        return out


class Head(nn.Module):
    """The two output layers."""

    def __init__(self, s1_bits: int, s2_bits: int, d_model: int) -> None:
        super().__init__()
        self.proj_s1 = nn.Linear(d_model, 2**s1_bits)
        self.proj_s2 = nn.Linear(d_model, 2**s2_bits)


class Predictor(nn.Module):
    """Next-token distributions over s1, then over s2 given s1."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = TokenEmbedding(c.s1_bits, c.s2_bits, c.d_model)
        self.time_emb = TimeEmbedding(c.d_model)
        self.token_dropout = nn.Dropout(c.token_dropout_p)
        self.transformer = nn.ModuleList(
            Block(
                c.d_model,
                c.n_heads,
                c.ff_dim,
                ffn_dropout=c.ffn_dropout_p,
                attn_dropout=c.attn_dropout_p,
                resid_dropout=c.resid_dropout_p,
            )
            for _ in range(c.n_layers)
        )
        self.norm = RMSNorm(c.d_model)
        self.dep_layer = DependencyLayer(c.d_model)
        self.head = Head(c.s1_bits, c.s2_bits, c.d_model)

    def hidden(self, s1: Tensor, s2: Tensor, stamps: Tensor | None) -> Tensor:
        """Map tokens (B, S) and stamps (B, S, 5), if any, to the trunk's states (B, S, d)."""
        x = self.embedding(s1, s2)
        if stamps is not None:
            x = x + self.time_emb(stamps)
        x = self.token_dropout(x)
        for block in self.transformer:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def s1_logits(self, hidden: Tensor) -> Tensor:
        """Map (..., d) to (..., 2^s1_bits)."""
        out: Tensor = self.head.proj_s1(hidden)
        return out

    def s2_logits(
        self, hidden: Tensor, s1: Tensor, *, rotate: bool = False, causal: bool = True
    ) -> Tensor:
        """s2 logits at every position, given its s1 token: (B, T, d), (B, T) to (B, T, 2^s2_bits).

        The default, unrotated and causal, is that of inference. ``rotate=True`` is the training
        mode of the reference.
        """
        out: Tensor = self.head.proj_s2(
            self.dep_layer(hidden, self.embedding.emb_s1(s1), rotate=rotate, causal=causal)
        )
        return out

    def s2_logits_last(self, hidden: Tensor, s1: Tensor) -> Tensor:
        """s2 logits at the last position only: (B, T, d), (B,) to (B, 2^s2_bits)."""
        query = self.embedding.emb_s1(s1)[:, None]
        attended = self.dep_layer.cross_attn(query, hidden, rotate=False, causal=False)
        out: Tensor = self.head.proj_s2(self.dep_layer.norm(hidden[:, -1] + attended[:, 0]))
        return out

    def forward(
        self, s1: Tensor, s2: Tensor, stamps: Tensor, s1_next: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits (B, S, 2^bits) of both levels, in the mode of inference."""
        hidden = self.hidden(s1, s2, stamps)
        return self.s1_logits(hidden), self.s2_logits(hidden, s1_next)
