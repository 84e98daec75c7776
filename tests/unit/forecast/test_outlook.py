"""Outlooks: what a message says of the paths, against its definitions."""

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


def _drawn(paths: int = 32, horizon: int = 24, *, price: float = 62_145.37) -> NDArray[np.float32]:
    """Channels drawn side by side, as a model does: some candles cannot be."""
    rng = np.random.default_rng([paths, horizon])
    prices = price * np.exp(rng.normal(0, 0.01, (paths, horizon, 4)))
    turnover = rng.normal(1, 1, (paths, horizon, 2))
    return np.concatenate((prices, turnover), axis=2).astype(np.float32)


def test_repaired_candles_can_be_and_open_and_close_stay() -> None:
    drawn = _drawn()
    kept = drawn.copy()
    candles, repaired = repair(drawn)
    opened, high, low, close, volume = np.moveaxis(candles, -1, 0)
    assert (high >= np.maximum(opened, close)).all()
    assert (low <= np.minimum(opened, close)).all()
    assert (volume >= 0).all()
    assert np.array_equal(candles[..., [0, 3]], drawn[..., [0, 3]])
    assert repaired == sum(
        not (h >= max(o, c) and lo <= min(o, c) and v >= 0)
        for o, h, lo, c, v, _ in drawn.reshape(-1, 6)
    )
    assert 0 < repaired < drawn.shape[0] * drawn.shape[1]
    assert np.array_equal(drawn, kept)
    again, changed = repair(np.concatenate((candles, drawn[..., 5:]), axis=-1))
    assert changed == 0
    assert np.array_equal(again, candles)


def test_bands_are_the_repaired_paths_quantiles_in_float32() -> None:
    drawn = _drawn()
    said = build_outlook(drawn, np.array(_TIMES), 62_000.0, _PROBS)
    candles, repaired = repair(drawn)
    assert said.times == _TIMES
    assert said.repaired == repaired
    assert list(said.channels) == list(PUBLISHED_CHANNELS)
    for column, channel in enumerate(PUBLISHED_CHANNELS):
        bands = said.channels[channel]
        assert list(bands) == ["mean", "q05", "q25", "q50", "q75", "q95"]
        mean = candles[..., column].mean(axis=0, dtype=np.float64)
        assert np.array_equal(np.array(bands["mean"], np.float32), mean.astype(np.float32))
        for p, band in zip(
            _PROBS, weibull_quantiles(candles[..., column], _PROBS).astype(np.float32), strict=True
        ):
            assert np.array_equal(np.array(bands[quantile_name(p)], np.float32), band)
    assert said.summary == summarise(candles, 62_000.0, _PROBS)


@pytest.mark.parametrize("price", [1.7e-8, 0.0123, 62_145.37, 9.9e20])
def test_numbers_are_the_shortest_that_name_their_float32(price: float) -> None:
    said = build_outlook(_drawn(price=price), _TIMES, price, _PROBS, publish="close")
    for number in said.channels["close"]["q25"]:
        assert type(number) is float
        assert len(Decimal(repr(number)).normalize().as_tuple().digits) <= 9
        assert repr(number) == repr(float(str(np.float32(number))))


def test_paths_are_kept_only_if_asked_for_and_exactly() -> None:
    drawn = _drawn(20, 8)
    assert build_outlook(drawn, _TIMES[:8], 62_000.0, _PROBS).paths is None
    said = build_outlook(drawn, _TIMES[:8], 62_000.0, _PROBS, publish="close")
    assert np.array_equal(np.array(said.paths, np.float32), drawn[..., 3])
    assert said.other_paths is None


def test_all_channels_of_the_paths_are_kept_as_published() -> None:
    drawn = _drawn(20, 8)
    drawn[0, 0, 5] = -1
    said = build_outlook(drawn, _TIMES[:8], 62_000.0, _PROBS, publish="ohlcva")
    assert said.other_paths is not None
    assert said.other_paths.keys() == {"open", "high", "low", "volume", "amount"}
    candles, _ = repair(drawn)
    for column, channel in ((0, "open"), (1, "high"), (2, "low"), (4, "volume")):
        kept = np.array(said.other_paths[channel], np.float32)
        assert np.array_equal(kept, candles[..., column])
    amounts = np.array(said.other_paths["amount"], np.float32)
    assert np.array_equal(amounts, np.maximum(drawn[..., 5], 0))


def test_what_is_undefined_is_none() -> None:
    said = build_outlook(_drawn(20, 1), _TIMES[:1], 0.0, _PROBS).summary
    assert (said.expected_return, said.volatility, said.value_at_risk_95) == (None, None, None)
    assert set(said.return_quantiles.values()) == {None}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 3, 4])
def test_paths_that_are_not_numbers_are_refused(bad: float, column: int) -> None:
    drawn = _drawn(20, 8)
    drawn[3, 2, column] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        build_outlook(drawn, _TIMES[:8], 62_000.0, _PROBS)


def test_too_few_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 19 paths, not 8"):
        build_outlook(_drawn(8, 8), _TIMES[:8], 62_000.0, _PROBS)


def test_an_outlook_travels_between_processes() -> None:
    said = build_outlook(_drawn(20, 8), _TIMES[:8], 62_000.0, _PROBS)
    assert pickle.loads(pickle.dumps(said)) == said  # noqa: S301 - our own
