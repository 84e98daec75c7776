"""Training losses of both networks, as the reference defines them (arXiv 2508.02739, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kronos_stream.model.config import TokenizerConfig
from kronos_stream.model.tokenizer import Reconstruction


class TokenizerLoss(NamedTuple):
    """Scalars; ``total`` is what is minimised."""

    coarse: Tensor
    full: Tensor
    bsq: Tensor
    total: Tensor


class PredictorLoss(NamedTuple):
    """Cross-entropies in nats per token; ``total`` is what is minimised."""

    s1: Tensor
    s2: Tensor
    total: Tensor


def tokenizer_loss(x: Tensor, out: Reconstruction, config: TokenizerConfig) -> TokenizerLoss:
    """Reconstruction error of both codes plus the quantiser's own loss, for x (B, S, d_in)."""
    coarse = F.mse_loss(out.coarse, x)
    full = F.mse_loss(out.full, x)
    bsq = bsq_loss(out.unit, out.quantised, config)
    return TokenizerLoss(coarse, full, bsq, (coarse + full + bsq) / 2)


def bsq_loss(unit: Tensor, quantised: Tensor, c: TokenizerConfig) -> Tensor:
    """Commitment plus entropy loss of codes (B, S, bits): decided bits, varied codes."""
    commitment = (quantised.detach() - unit).square().sum(-1).mean()
    entropy = c.gamma0 * bit_entropy(unit) - c.gamma * code_entropy(unit)
    return c.beta * commitment + c.zeta * entropy


def bit_entropy(unit: Tensor) -> Tensor:
    """Mean over positions of the summed entropies of the soft bits: low means decided."""
    return _entropy(soft_bits(unit)).sum(-1).mean()


def code_entropy(unit: Tensor) -> Tensor:
    """Summed entropies of the batch-mean soft bits: high means varied.

    The paper groups bits and takes each group's code distribution; the reference's code
    overwrites that distribution with the bits' own, so ``group_size`` has no effect there.
    This follows the code, which is what the published checkpoints were trained with.
    """
    return _entropy(soft_bits(unit).flatten(0, -2).mean(0)).sum()


def soft_bits(unit: Tensor) -> Tensor:
    """Probability of each bit being 0 under the soft quantiser, (B, S, bits)."""
    return torch.sigmoid(-4 * unit * unit.shape[-1] ** -0.5)


def _entropy(p: Tensor) -> Tensor:
    """Entropy of Bernoulli variables, in nats, elementwise."""
    return -(p * torch.log(p + 1e-8) + (1 - p) * torch.log(1 - p + 1e-8))


def predictor_loss(
    s1_logits: Tensor, s2_logits: Tensor, s1_next: Tensor, s2_next: Tensor
) -> PredictorLoss:
    """Next-token cross-entropy: logits (B, S, V), targets (B, S)."""
    s1 = F.cross_entropy(s1_logits.flatten(0, 1), s1_next.flatten())
    s2 = F.cross_entropy(s2_logits.flatten(0, 1), s2_next.flatten())
    return PredictorLoss(s1, s2, (s1 + s2) / 2)
