"""Reconstruction error of a tokenizer on real windows, normalised as in serving."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kronos_stream.channels import PRICES
from kronos_stream.evaluation.cases import Case
from kronos_stream.evaluation.scoring import Interval, block_bootstrap
from kronos_stream.model import Tokenizer
from kronos_stream.training import codebook
from kronos_stream.training.windows import normalise


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Squared errors of the four price channels as shares of their variance."""

    full: Interval
    coarse: Interval
    codebook: codebook.CodebookUsage

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a JSON-compatible dictionary."""
        return asdict(self)


@torch.inference_mode()
def reconstruction(tokenizer: Tokenizer, cases: Iterable[Case], *, seed: int = 0) -> Reconstruction:
    """Encode and decode the history of every case, normalised over the whole history."""
    full, coarse, variance, blocks, s1, s2 = [], [], [], [], [], []
    for case in cases:
        values = case.history.values[None]
        x = torch.from_numpy(normalise(values, np.array([values.shape[1]])))
        out = tokenizer(x)
        prices = x[..., PRICES]
        full.append(float((out.full[..., PRICES] - prices).square().sum()))
        coarse.append(float((out.coarse[..., PRICES] - prices).square().sum()))
        variance.append(float(prices.square().sum()))
        blocks.append(case.block)
        tokens = tokenizer.tokenise(x)
        s1.append(tokens[0].flatten())
        s2.append(tokens[1].flatten())
    groups = np.array(blocks)
    intervals = [
        block_bootstrap([np.array(part), np.array(variance)], groups, seed=seed)[0]
        for part in (full, coarse)
    ]
    bits = tokenizer.config
    book = codebook.measure_usage(torch.cat(s1), torch.cat(s2), bits.s1_bits, bits.s2_bits)
    return Reconstruction(intervals[0], intervals[1], book)
