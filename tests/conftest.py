"""What the tests of the model share: the reference's fixtures and the checkpoint they are about.

The fixtures in ``data/parity`` were made with the reference implementation
(github.com/shiyu-coder/Kronos, MIT): inputs and its answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kronos_stream.model import Predictor, Tokenizer, load_predictor, load_tokenizer


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of the reference's fixtures: ``tiny`` and ``published``."""
    return Path(__file__).parent / "data" / "parity"


@pytest.fixture(scope="session")
def cases(parity: Path) -> dict[str, NDArray[Any]]:
    """The tiny fixture's arrays by name; read-only."""
    with np.load(parity / "tiny" / "cases.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@pytest.fixture(scope="session")
def expected(parity: Path) -> dict[str, Any]:
    """The tiny fixture's scalars: greedy cases, training losses, gradient norms."""
    described: dict[str, Any] = json.loads((parity / "tiny" / "cases.json").read_text("utf-8"))
    return described


@pytest.fixture(scope="session")
def tiny_tokenizer(parity: Path) -> Tokenizer:
    """The tiny tokenizer as loaded; shared, so a test that changes it loads its own."""
    return load_tokenizer(parity / "tiny" / "tokenizer")


@pytest.fixture(scope="session")
def tiny_predictor(parity: Path) -> Predictor:
    """The tiny predictor as loaded; shared, so a test that changes it loads its own."""
    return load_predictor(parity / "tiny" / "predictor")
