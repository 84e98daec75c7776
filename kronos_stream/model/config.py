"""Configuration of the two networks, as stored in a checkpoint's ``config.json``.

Sizes of the published models: table 2 of arXiv 2508.02739 and the hub's ``config.json`` files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

CANDLE_CHANNELS = 6
"""open, high, low, close, volume, amount, in this order."""

S2_HEADS = 4
"""Heads of the s2 cross-attention: fixed by the architecture, independent of ``n_heads``."""


@dataclass(frozen=True, slots=True)
class _Config:
    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Build from the known fields of ``raw``; raise ValueError for missing ones."""
        known = {f.name: f for f in fields(cls)}
        try:
            return cls(**{name: raw[name] for name in known if name in raw})
        except TypeError as error:
            raise ValueError(f"not a {cls.__name__}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _check_heads(self, d_model: int, n_heads: int) -> None:
        if d_model % n_heads or (d_model // n_heads) % 2:
            raise ValueError(f"d_model {d_model} does not split into {n_heads} heads of even width")


@dataclass(frozen=True, slots=True)
class TokenizerConfig(_Config):
    """Configuration of the tokenizer, which converts candles to s1 (coarse) and s2 (fine) tokens.

    ``n_enc_layers`` and ``n_dec_layers`` include the embedding, so there is one block fewer.
    """

    d_model: int
    n_heads: int
    ff_dim: int
    n_enc_layers: int
    n_dec_layers: int
    s1_bits: int
    s2_bits: int
    d_in: int = CANDLE_CHANNELS
    ffn_dropout_p: float = 0.0
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.0
    beta: float = 0.05
    gamma0: float = 1.0
    gamma: float = 1.1
    zeta: float = 0.05
    group_size: int = 4

    def __post_init__(self) -> None:
        self._check_heads(self.d_model, self.n_heads)
        if self.code_bits % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide {self.code_bits} bits")

    @property
    def code_bits(self) -> int:
        return self.s1_bits + self.s2_bits


@dataclass(frozen=True, slots=True)
class PredictorConfig(_Config):
    """Configuration of the predictor. Only learned time embeddings are supported."""

    s1_bits: int
    s2_bits: int
    n_layers: int
    d_model: int
    n_heads: int
    ff_dim: int
    ffn_dropout_p: float = 0.0
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.0
    token_dropout_p: float = 0.0
    learn_te: bool = True

    def __post_init__(self) -> None:
        self._check_heads(self.d_model, self.n_heads)
        self._check_heads(self.d_model, S2_HEADS)
        if not self.learn_te:
            raise ValueError("learn_te=false: fixed time embeddings are not supported")


def check_matching_bits(predictor: PredictorConfig, tokenizer: TokenizerConfig) -> None:
    """Raise ValueError if the networks' tokens have different sizes."""
    if (predictor.s1_bits, predictor.s2_bits) != (tokenizer.s1_bits, tokenizer.s2_bits):
        raise ValueError(
            f"the predictor's tokens have {predictor.s1_bits}+{predictor.s2_bits} bits, the "
            f"tokenizer's {tokenizer.s1_bits}+{tokenizer.s2_bits}; use the tokenizer with which "
            "the predictor was trained"
        )


def _published(n_layers: int, d_model: int, ff_dim: int, n_heads: int) -> PredictorConfig:
    return PredictorConfig(10, 10, n_layers, d_model, n_heads, ff_dim)


PUBLISHED_PREDICTORS = {
    "mini": _published(4, 256, 512, 4),
    "small": _published(8, 512, 1024, 8),
    "base": _published(12, 832, 2048, 16),
    "large": _published(18, 1664, 3072, 32),
}
"""Predictor sizes by name; the weights of ``large`` are not published."""

PUBLISHED_TOKENIZER = TokenizerConfig(
    d_model=256, n_heads=4, ff_dim=512, n_enc_layers=4, n_dec_layers=4, s1_bits=10, s2_bits=10
)
"""Shape of Kronos-Tokenizer-base."""
