"""Outlooks: repair, bands and published paths, compared with their definitions."""

from __future__ import annotations

import pickle
from decimal import Decimal

import numpy as np
import pytest
from numpy.typing import NDArray

from kronos_stream.forecast.outlook import PUBLISHED_CHANNELS, build_outlook, repair
from kronos_stream.forecast.quantiles import quantile_name, weibull_quantiles
from kronos_stream.forecast.summary import summarise

_PROBS = (0.05, 0.25, 0.5, 0.75, 0.95)
_TIMES = [1_718_709_300_000 + 300_000 * step for step in range(1, 25)]


def _sampled(
    paths: int = 32, horizon: int = 24, *, price: float = 62_145.37
) -> NDArray[np.float32]:
    """Paths with independent channels, as from a model: some candles are inconsistent."""
    rng = np.random.default_rng([paths, horizon])
    prices = price * np.exp(rng.normal(0, 0.01, (paths, horizon, 4)))
    turnover = rng.normal(1, 1, (paths, horizon, 2))
    return np.concatenate((prices, turnover), axis=2).astype(np.float32)


def test_repaired_candles_are_consistent_and_keep_open_and_close() -> None:
    sampled = _sampled()
    kept = sampled.copy()
    candles, repaired = repair(sampled)
    opened, high, low, close, volume = np.moveaxis(candles, -1, 0)
    assert (high >= np.maximum(opened, close)).all()
    assert (low <= np.minimum(opened, close)).all()
    assert (volume >= 0).all()
    assert np.array_equal(candles[..., [0, 3]], sampled[..., [0, 3]])
    assert repaired == sum(
        not (h >= max(o, c) and lo <= min(o, c) and v >= 0)
        for o, h, lo, c, v, _ in sampled.reshape(-1, 6)
    )
    assert 0 < repaired < sampled.shape[0] * sampled.shape[1]
    assert np.array_equal(sampled, kept)
    again, changed = repair(np.concatenate((candles, sampled[..., 5:]), axis=-1))
    assert changed == 0
    assert np.array_equal(again, candles)


def test_bands_are_float32_quantiles_of_repaired_paths() -> None:
    sampled = _sampled()
    outlook = build_outlook(sampled, np.array(_TIMES), 62_000.0, _PROBS)
    candles, repaired = repair(sampled)
    assert outlook.times == _TIMES
    assert outlook.repaired == repaired
    assert list(outlook.channels) == list(PUBLISHED_CHANNELS)
    for column, channel in enumerate(PUBLISHED_CHANNELS):
        bands = outlook.channels[channel]
        assert list(bands) == ["mean", "q05", "q25", "q50", "q75", "q95"]
        mean = candles[..., column].mean(axis=0, dtype=np.float64)
        assert np.array_equal(np.array(bands["mean"], np.float32), mean.astype(np.float32))
        for p, band in zip(
            _PROBS, weibull_quantiles(candles[..., column], _PROBS).astype(np.float32), strict=True
        ):
            assert np.array_equal(np.array(bands[quantile_name(p)], np.float32), band)
    assert outlook.summary == summarise(candles, 62_000.0, _PROBS)


@pytest.mark.parametrize("price", [1.7e-8, 0.0123, 62_145.37, 9.9e20])
def test_numbers_are_the_shortest_that_identify_their_float32(price: float) -> None:
    outlook = build_outlook(_sampled(price=price), _TIMES, price, _PROBS, publish="close")
    for number in outlook.channels["close"]["q25"]:
        assert type(number) is float
        assert len(Decimal(repr(number)).normalize().as_tuple().digits) <= 9
        assert repr(number) == repr(float(str(np.float32(number))))


def test_paths_are_published_exactly_and_only_on_request() -> None:
    sampled = _sampled(20, 8)
    assert build_outlook(sampled, _TIMES[:8], 62_000.0, _PROBS).paths is None
    outlook = build_outlook(sampled, _TIMES[:8], 62_000.0, _PROBS, publish="close")
    assert np.array_equal(np.array(outlook.paths, np.float32), sampled[..., 3])
    assert outlook.other_paths is None


def test_all_channels_of_the_paths_are_published_on_request() -> None:
    sampled = _sampled(20, 8)
    sampled[0, 0, 5] = -1
    outlook = build_outlook(sampled, _TIMES[:8], 62_000.0, _PROBS, publish="ohlcva")
    assert outlook.other_paths is not None
    assert outlook.other_paths.keys() == {"open", "high", "low", "volume", "amount"}
    candles, _ = repair(sampled)
    for column, channel in ((0, "open"), (1, "high"), (2, "low"), (4, "volume")):
        kept = np.array(outlook.other_paths[channel], np.float32)
        assert np.array_equal(kept, candles[..., column])
    amounts = np.array(outlook.other_paths["amount"], np.float32)
    assert np.array_equal(amounts, np.maximum(sampled[..., 5], 0))


def test_undefined_figures_are_none() -> None:
    summary = build_outlook(_sampled(20, 1), _TIMES[:1], 0.0, _PROBS).summary
    undefined = {summary.expected_return, summary.volatility, summary.value_at_risk_95}
    assert undefined == {None}
    assert set(summary.return_quantiles.values()) == {None}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 3, 4])
def test_non_finite_paths_raise(bad: float, column: int) -> None:
    sampled = _sampled(20, 8)
    sampled[3, 2, column] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        build_outlook(sampled, _TIMES[:8], 62_000.0, _PROBS)


def test_too_few_paths_raise() -> None:
    with pytest.raises(ValueError, match="at least 19 paths, not 8"):
        build_outlook(_sampled(8, 8), _TIMES[:8], 62_000.0, _PROBS)


def test_outlook_can_be_pickled() -> None:
    outlook = build_outlook(_sampled(20, 8), _TIMES[:8], 62_000.0, _PROBS)
    assert pickle.loads(pickle.dumps(outlook)) == outlook  # noqa: S301 - our own
