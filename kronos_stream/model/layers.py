"""Layers of both networks: RMSNorm, rotary attention, SwiGLU, pre-norm block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-5
ROPE_BASE = 10000.0


class RMSNorm(nn.Module):
    """Root-mean-square norm, always computed in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=NORM_EPS).type_as(x) * self.weight


class Rotary(nn.Module):
    """Rotary position embedding; rotates the halves (x1, x2), positions counted from 0."""

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inv_freq", 1.0 / ROPE_BASE**exponent)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rotate each (..., S, head_dim) tensor; all have the same length S."""
        positions = torch.arange(tensors[0].shape[-2], device=self.inv_freq.device)
        angles = positions[:, None].float() * self.inv_freq  # (S, head_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        return tuple(self._rotate(x, cos, sin) for x in tensors)

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention with biases; self-attention when ``context`` is not given."""

    def __init__(
        self, d_model: int, n_heads: int, attn_dropout: float = 0.0, resid_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.rotary = Rotary(d_model // n_heads)
        self.attn_dropout = attn_dropout
        self.resid_dropout = nn.Dropout(resid_dropout)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, rotate: bool = True, causal: bool = True
    ) -> Tensor:
        """Attend from x (B, S, d) to ``context`` (B, T, d); returns (B, S, d).

        ``rotate`` and ``causal`` need S = T.
        """
        source = x if context is None else context
        q, k = self.heads(self.q_proj(x)), self.heads(self.k_proj(source))
        v = self.heads(self.v_proj(source))
        if rotate:
            q, k = self.rotary(q, k)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=self.attn_dropout if self.training else 0.0
        )
        out: Tensor = self.resid_dropout(self.out_proj(mixed.transpose(1, 2).flatten(2)))
        return out

    def heads(self, x: Tensor) -> Tensor:
        """Split (B, S, d) to (B, heads, S, head_dim)."""
        return x.view(*x.shape[:-1], self.n_heads, -1).transpose(1, 2)


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)``, no biases."""

    def __init__(self, d_model: int, ff_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, ff_dim, bias=False)
        self.w3 = nn.Linear(d_model, ff_dim, bias=False)
        self.w2 = nn.Linear(ff_dim, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block, causal."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        *,
        ffn_dropout: float = 0.0,
        attn_dropout: float = 0.0,
        resid_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(d_model)
        self.self_attn = Attention(d_model, n_heads, attn_dropout, resid_dropout)
        self.norm2 = RMSNorm(d_model)
        self.ffn = SwiGLU(d_model, ff_dim, ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, d) to (B, S, d)."""
        x = x + self.self_attn(self.norm1(x))
        out: Tensor = x + self.ffn(self.norm2(x))
        return out
