"""Codebook usage of a tokenizer, to detect a collapsed code."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

DEAD_BIT_SHARE = 0.005
"""A bit is dead if fewer than this share of bars have the other value."""

COLLAPSE_SHARE = 0.05
"""A level whose perplexity is below this share of its codes has collapsed."""


@dataclass(frozen=True, slots=True)
class CodebookUsage:
    """Usage over held-out bars; shares of the codes that so many bars can use at most."""

    bars: int
    s1_used: float
    s2_used: float
    joint_used: float
    s1_perplexity: float
    s2_perplexity: float
    joint_perplexity: float
    dead_bits: int
    s1_codes: int
    s2_codes: int

    def to_dict(self) -> dict[str, float]:
        """Return the values as a JSON-compatible dictionary."""
        return asdict(self)

    def warning(self) -> str | None:
        """One line when the code is collapsing, else None."""
        reasons = []
        if self.dead_bits:
            reasons.append(f"{self.dead_bits} dead bit{'s' if self.dead_bits > 1 else ''}")
        for level, codes, perplexity in (
            ("s1", self.s1_codes, self.s1_perplexity),
            ("s2", self.s2_codes, self.s2_perplexity),
        ):
            if perplexity < COLLAPSE_SHARE * min(codes, self.bars):
                reasons.append(f"{level} perplexity {perplexity:.1f} of {codes} codes")
        if not reasons:
            return None
        return "the codebook is collapsing: " + ", ".join(reasons) + "; raise zeta or entropy_scale"


def measure_usage(s1: Tensor, s2: Tensor, s1_bits: int, s2_bits: int) -> CodebookUsage:
    """Usage of token tensors of equal shape."""
    s1, s2 = s1.flatten(), s2.flatten()
    joint = s1 << s2_bits | s2
    dead = 0
    for tokens, bits in ((s1, s1_bits), (s2, s2_bits)):
        for bit in range(bits):
            share = (tokens >> bit & 1).double().mean().item()
            dead += share < DEAD_BIT_SHARE or share > 1 - DEAD_BIT_SHARE
    return CodebookUsage(
        len(s1),
        _used(s1, s1_bits),
        _used(s2, s2_bits),
        _used(joint, s1_bits + s2_bits),
        _perplexity(s1),
        _perplexity(s2),
        _perplexity(joint),
        dead,
        2**s1_bits,
        2**s2_bits,
    )


def _used(tokens: Tensor, bits: int) -> float:
    return len(tokens.unique()) / min(1 << bits, len(tokens))


def _perplexity(tokens: Tensor) -> float:
    counts: list[int] = torch.unique(tokens, return_counts=True)[1].tolist()
    shares = (count / len(tokens) for count in counts)
    return math.exp(-sum(share * math.log(share) for share in shares))
