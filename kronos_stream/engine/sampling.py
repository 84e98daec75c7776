"""Token sampling: temperature, top-k and top-p, then inverse transform of one uniform number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of a call. Raises ValueError when one is out of range.

    temperature: one number, or one per horizon step (the last one applies to later steps).
    top_k: keep the k most likely tokens; 0 keeps all; 1 is greedy.
    top_p: then keep the smallest set of most likely tokens with this share of the remaining mass.
    """

    temperature: float | tuple[float, ...] = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        steps = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not steps or not all(MIN_TEMPERATURE <= t < float("inf") for t in steps):
            raise ValueError(
                f"temperature {self.temperature!r}: each must be at least {MIN_TEMPERATURE} and "
                "finite; for greedy sampling use top_k=1"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all tokens) or a positive count")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")

    def temperature_at(self, step: int) -> float:
        if isinstance(self.temperature, tuple):
            return self.temperature[min(step, len(self.temperature) - 1)]
        return self.temperature


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, step: int) -> Tensor:
    """Draw tokens (R,) int64 from logits (R, V) float32 with uniform numbers (R,)."""
    if sampling.top_k == 1:
        return logits.argmax(-1)
    p = filtered(logits, sampling, step)
    cdf = p.cumsum(-1)
    # The first token whose cumulative mass reaches the target has positive mass, so it is never a
    # filtered one. The target cannot exceed the last sum by rounding.
    target = uniform[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, target)
    if cdf.device.type != "cpu":
        # Accelerators sum in a tree, so a token without mass may appear to have one ulp.
        token = token.clamp(max=cdf.shape[-1] - 1)
        token = torch.where(p.gather(-1, token) > 0, token, p.argmax(-1, keepdim=True))
    return token[:, 0]


def filtered(logits: Tensor, sampling: Sampling, step: int) -> Tensor:
    """Return unnormalised probabilities (R, V), exactly 0 for every filtered token."""
    temperature = sampling.temperature_at(step)
    if temperature != 1.0:
        # Subtract the maximum first to keep tiny temperatures finite.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    p = torch.softmax(logits, dim=-1)
    vocabulary = p.shape[-1]
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    if top_k == vocabulary and sampling.top_p == 1.0:
        return p
    # In ascending order the mass of the more likely tokens is the total minus the cumulative sum. A
    # token is kept while that is at most top_p of the mass that top_k kept.
    ascending = _sort(p)[:, vocabulary - top_k :]
    cumulated = ascending.cumsum(-1)
    dropped = (1.0 - sampling.top_p) * cumulated[:, -1:]
    threshold = ascending.gather(-1, torch.searchsorted(cumulated, dropped))
    # A product with 0 and 1: torch.where takes ten times as long on a CPU.
    return p.clone().ge_(threshold).mul_(p)


def _sort(p: Tensor) -> Tensor:
    if p.device.type == "cpu":
        # numpy sorts only values, with SIMD: 14 times as fast as torch.sort on (256, 1024).
        return torch.from_numpy(np.sort(p.numpy(), axis=-1))
    return torch.sort(p, dim=-1).values
