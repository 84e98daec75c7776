"""Fixtures: a small file of candles and a small tokenizer."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from kronos_stream.model import Tokenizer, TokenizerConfig, save
from kronos_stream.testing.market import Market


@pytest.fixture(scope="module")
def candles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of candles."""
    bars = Market(1, 300_000, seed=3).run(1_500)
    names = ["open", "high", "low", "close", "volume", "amount"]
    path = tmp_path_factory.mktemp("candles") / "candles.csv"
    pd.DataFrame(bars.values[:, 0], columns=names).assign(time=bars.times).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with random weights, saved."""
    torch.manual_seed(0)
    network = Tokenizer(TokenizerConfig(16, 4, 32, 2, 2, 4, 4))
    return save(network, tmp_path_factory.mktemp("tokenizer"))
