"""Training losses of both networks, as the reference defines them (arXiv 2508.02739, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kronos_stream.model.config import TokenizerConfig
from kronos_stream.model.tokenizer import TokenizerOutput, unpack_bits


class TokenizerLoss(NamedTuple):
    """Scalars; ``total`` is minimised."""

    coarse: Tensor
    full: Tensor
    bsq: Tensor
    total: Tensor


class PredictorLoss(NamedTuple):
    """Cross-entropies in nats per token; ``total`` is minimised."""

    s1: Tensor
    s2: Tensor
    total: Tensor


def _identity(mean: Tensor) -> Tensor:
    return mean


def tokenizer_loss(
    x: Tensor,
    out: TokenizerOutput,
    config: TokenizerConfig,
    *,
    weights: Tensor | None = None,
    channels: Tensor | None = None,
    scale: float = 1.0,
    group: int = 1,
    average: Callable[[Tensor], Tensor] = _identity,
) -> TokenizerLoss:
    """Reconstruction error of both codes plus the quantiser's own loss, for x (B, S, d_in).

    ``weights`` (B, S) sum to 1 in every row, ``channels`` (d_in,) have mean 1; by default all
    weights are equal. For ``scale``, ``group`` and ``average`` see :func:`soft_bits` and
    :func:`code_entropy`.
    """
    coarse = _squared_error(out.coarse, x, weights, channels)
    full = _squared_error(out.full, x, weights, channels)
    bsq = bsq_loss(out.unit, out.quantised, config, scale=scale, group=group, average=average)
    return TokenizerLoss(coarse, full, bsq, (coarse + full + bsq) / 2)


def _squared_error(y: Tensor, x: Tensor, weights: Tensor | None, channels: Tensor | None) -> Tensor:
    if weights is None and channels is None:
        return F.mse_loss(y, x)
    error = (y - x).square()
    if channels is not None:
        error = error * channels
    by_bar = error.mean(-1)
    return by_bar.mean() if weights is None else (by_bar * weights).sum(-1).mean()


def bsq_loss(
    unit: Tensor,
    quantised: Tensor,
    c: TokenizerConfig,
    *,
    scale: float = 1.0,
    group: int = 1,
    average: Callable[[Tensor], Tensor] = _identity,
) -> Tensor:
    """Commitment plus entropy loss of codes (B, S, bits), for definite bits and diverse codes."""
    commitment = (quantised.detach() - unit).square().sum(-1).mean()
    diversity = code_entropy(unit, scale=scale, group=group, average=average)
    entropy = c.gamma0 * bit_entropy(unit, scale) - c.gamma * diversity
    return c.beta * commitment + c.zeta * entropy


def bit_entropy(unit: Tensor, scale: float = 1.0) -> Tensor:
    """Mean over positions of the summed entropies of the soft bits; low if bits are definite."""
    return _entropy(soft_bits(unit, scale)).sum(-1).mean()


def code_entropy(
    unit: Tensor,
    *,
    scale: float = 1.0,
    group: int = 1,
    average: Callable[[Tensor], Tensor] = _identity,
) -> Tensor:
    """Summed entropies of the batch-mean soft bits; high if codes are diverse.

    The paper groups bits and takes each group's code distribution; the reference's code
    overwrites that distribution with that of the single bits, so ``group_size`` has no effect.
    This function follows the code, with which the published checkpoints were trained.

    ``group`` above 1 is the paper's form, over all 2^group codes of every ``group`` neighbouring
    bits. It also detects identical bits, which are balanced one by one but not jointly.

    The entropy is not linear in the mean: ``average`` averages the means of processes that
    share a batch, and must pass gradients.
    """
    if group == 1:
        return _entropy(average(soft_bits(unit, scale).flatten(0, -2).mean(0))).sum()
    codes = unpack_bits(torch.arange(2**group, device=unit.device), group) * 2.0 - 1  # (2^g, g)
    grouped = unit.flatten(0, -2).unflatten(-1, (-1, group))  # (positions, groups, g)
    logits = grouped @ codes.T * (2 * scale * unit.shape[-1] ** -0.5)
    mean = average(logits.softmax(-1).mean(0))  # (groups, 2^g)
    return -(mean * torch.log(mean + 1e-8)).sum()


def soft_bits(unit: Tensor, scale: float = 1.0) -> Tensor:
    """Probability of each bit being 0 under the soft quantiser, (B, S, bits).

    ``scale`` multiplies the reference's inverse temperature, at which all bits remain soft.
    """
    return torch.sigmoid(-4 * scale * unit * unit.shape[-1] ** -0.5)


def _entropy(p: Tensor) -> Tensor:
    """Entropy of Bernoulli variables, in nats, elementwise."""
    return -(p * torch.log(p + 1e-8) + (1 - p) * torch.log(1 - p + 1e-8))


def predictor_loss(
    s1_logits: Tensor,
    s2_logits: Tensor,
    s1_next: Tensor,
    s2_next: Tensor,
    weights: Tensor | None = None,
) -> PredictorLoss:
    """Next-token cross-entropy: logits (B, S, V), targets (B, S).

    ``weights`` (B, S) sum to 1 in every row; by default all positions have equal weight.
    """
    s1 = _cross_entropy(s1_logits, s1_next, weights)
    s2 = _cross_entropy(s2_logits, s2_next, weights)
    return PredictorLoss(s1, s2, (s1 + s2) / 2)


def _cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (loss.view_as(weights) * weights).sum(-1).mean()
