"""The published small model gives the reference implementation's own regression results.

Expected values: ``data/parity/published``, made by the reference (github.com/shiyu-coder/Kronos,
MIT) with these revisions in fp32 on a CPU. Needs some 120 MB of weights from the model hub or its
cache.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import try_to_load_from_cache

from kronos_stream import Context, Forecaster
from kronos_stream.model.checkpoint import PINNED_REVISIONS, CheckpointError, fetch_checkpoint

pytestmark = pytest.mark.hub

ENDPOINT = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
MODEL = "NeoQuasar/Kronos-small"
TOKENIZER = "NeoQuasar/Kronos-Tokenizer-base"
CHANNELS = ["open", "high", "low", "close", "volume", "amount"]
HORIZON = 8
TOLERANCE = 1e-5
"""Relative, of every value: what the reference's own test asks for."""


def is_cached(name: str) -> bool:
    """Return whether both files of the pinned revision are cached."""
    files = ("config.json", "model.safetensors")
    found = [try_to_load_from_cache(name, f, revision=PINNED_REVISIONS[name]) for f in files]
    return all(isinstance(path, str) for path in found)


def hub_answers() -> bool:
    """Return whether the hub answers within seconds; its client would retry for long."""
    try:
        urlopen(ENDPOINT, timeout=5).close()  # noqa: S310 - the user's own setting
    except HTTPError:
        return True
    except (URLError, OSError):
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def _weights() -> None:
    """Skip, with the reason, if the weights are unavailable."""
    names = (MODEL, TOKENIZER)
    if not all(map(is_cached, names)) and not hub_answers():
        pytest.skip("the published weights are not in the hub's cache and the hub does not answer")
    try:
        for name in names:
            fetch_checkpoint(name)
    except CheckpointError as error:
        pytest.skip(str(error))


def candles(parity: Path, name: str) -> pd.DataFrame:
    """A CSV of the published fixture, its time stamps parsed."""
    return pd.read_csv(parity / "published" / f"regression_{name}.csv", parse_dates=["timestamps"])


def milliseconds(times: pd.Series[pd.Timestamp]) -> list[int]:
    """Time stamps as UTC milliseconds."""
    return [round(time.timestamp() * 1000) for time in times]


@pytest.mark.parametrize("lookback", [256, 512])
def test_compat_gives_the_published_results(parity_folder: Path, lookback: int) -> None:
    """The reference's API gives its greedy forecasts, at 512 bars past the model's window."""
    from kronos_stream.compat import Kronos, KronosPredictor, KronosTokenizer

    history = candles(parity_folder, "input").head(lookback)
    wanted = candles(parity_folder, f"output_{lookback}")
    predictor = KronosPredictor(
        Kronos.from_pretrained(MODEL),
        KronosTokenizer.from_pretrained(TOKENIZER),
        device="cpu",
        max_context=512,
    )
    result = predictor.predict(
        df=history[CHANNELS],
        x_timestamp=history["timestamps"],
        y_timestamp=wanted["timestamps"],
        pred_len=HORIZON,
        T=1.0,
        top_k=1,
        top_p=1.0,
        sample_count=1,
    )
    np.testing.assert_allclose(result[CHANNELS], wanted[CHANNELS], rtol=TOLERANCE)


def test_forecaster_gives_the_published_results(parity_folder: Path) -> None:
    """The Forecaster's greedy path is the reference's, at the time stamps it was given."""
    history = candles(parity_folder, "input").head(256)
    wanted = candles(parity_folder, "output_256")
    forecaster = Forecaster.from_pretrained(
        MODEL, tokenizer=TOKENIZER, device="cpu", dtype="float32"
    )
    context = Context(
        history[CHANNELS].to_numpy(),
        milliseconds(history["timestamps"]),
        timeframe="5m",
        future_times=milliseconds(wanted["timestamps"]),
    )
    (paths,) = forecaster.sample([context], horizon=HORIZON, paths=1, top_k=1)
    assert paths.shape == (1, HORIZON, len(CHANNELS))
    assert paths.dtype == np.float32
    np.testing.assert_allclose(paths[0], wanted[CHANNELS], rtol=TOLERANCE)
