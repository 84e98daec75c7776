"""Fixtures: the tiny checkpoint under the reference's class names."""

from __future__ import annotations

from pathlib import Path

import pytest

from kronos_stream.compat import Kronos, KronosPredictor, KronosTokenizer


@pytest.fixture
def tokenizer(parity_folder: Path) -> KronosTokenizer:
    return KronosTokenizer.from_pretrained(parity_folder / "tiny" / "tokenizer")


@pytest.fixture
def model(parity_folder: Path) -> Kronos:
    return Kronos.from_pretrained(str(parity_folder / "tiny" / "predictor"))


@pytest.fixture
def predictor(model: Kronos, tokenizer: KronosTokenizer) -> KronosPredictor:
    return KronosPredictor(model, tokenizer, device="cpu", max_context=128)
