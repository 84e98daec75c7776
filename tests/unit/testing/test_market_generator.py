"""The generated market has the properties of real ones, and is reproducible."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kronos_stream.testing.market import Market, aggregate

FIVE_MINUTES = 300_000


@pytest.fixture(scope="module")
def returns_and_volumes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One-bar log returns and volumes of 64 symbols over six weeks of 5-minute bars."""
    values = Market(64, FIVE_MINUTES, seed=5).run(12_000).values
    return np.diff(np.log(values[..., 3]), axis=0), values[1:, :, 4]


def autocorrelation(x: NDArray[np.float64], lag: int) -> float:
    """Mean over symbols of the autocorrelation at ``lag`` of x (T, symbols)."""
    x = x - x.mean(0)
    return float(((x[lag:] * x[:-lag]).mean(0) / x.var(0)).mean())


def test_returns_have_heavy_tails(
    returns_and_volumes: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    returns, _ = returns_and_volumes
    # Hill's estimator on the largest percent: real markets have tail indices of 2 to 5.
    size = np.sort(np.abs(returns), axis=0)[::-1]
    k = len(returns) // 100
    index = 1 / np.log(size[:k] / size[k]).mean(0)
    assert 2 < np.median(index) < 5


def test_volatility_clusters_and_returns_do_not(
    returns_and_volumes: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    returns, _ = returns_and_volumes
    size = np.abs(returns)
    assert autocorrelation(size, 1) > 0.2
    assert autocorrelation(size, 50) > 0.05
    for lag in (1, 2, 5, 20):
        assert abs(autocorrelation(returns, lag)) < 0.05


def test_volume_follows_volatility_and_the_clock(
    returns_and_volumes: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    returns, volumes = returns_and_volumes
    log_volume = np.log1p(volumes)
    pairs = zip(log_volume.T, np.abs(returns).T, strict=True)
    assert np.mean([np.corrcoef(v, r)[0, 1] for v, r in pairs]) > 0.25
    day = 288
    by_time = volumes[: len(volumes) // day * day].reshape(-1, day, 64).mean((0, 2))
    assert by_time.max() > 2 * by_time.min()


def test_falls_raise_volatility_more_than_rises() -> None:
    returns = np.diff(np.log(Market(256, 3_600_000, seed=6).run(4_000).values[..., 3]), axis=0)
    size = np.minimum(np.abs(returns), np.quantile(np.abs(returns), 0.99, axis=0))
    later = sum(size[lag : lag - 10] for lag in range(1, 10))
    now = np.sign(returns[:-10])
    effect = [np.corrcoef(a, b)[0, 1] for a, b in zip(now.T, np.asarray(later).T, strict=True)]
    assert np.mean(effect) < -0.005


def test_symbols_move_together(
    returns_and_volumes: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    returns, _ = returns_and_volumes
    above = np.triu_indices(returns.shape[1], 1)
    assert 0.1 < np.asarray(np.corrcoef(returns.T))[above].mean() < 0.7


@pytest.mark.parametrize("timeframe_ms", [1_000, 60_000, 14_400_000, 86_400_000, 604_800_000])
def test_candles_are_valid_and_on_the_price_grid(timeframe_ms: int) -> None:
    market = Market(16, timeframe_ms, seed=7)
    candles = market.run(2_000)
    opened, high, low, close, volume, amount = np.moveaxis(candles.values, -1, 0)
    assert np.isfinite(candles.values).all()
    assert (high >= np.maximum(opened, close)).all()
    assert (low <= np.minimum(opened, close)).all()
    assert (low > 0).all()
    assert (volume >= 0).all()
    assert ((amount > 0) == (volume > 0)).all()
    ticks = close / market.tick
    np.testing.assert_allclose(ticks, np.round(ticks), atol=1e-3, rtol=1e-9)
    assert (np.diff(candles.times) == timeframe_ms).all()


def test_prices_stay_finite_for_decades() -> None:
    prices = Market(32, 86_400_000, seed=8).run(20_000).values[..., 3]
    assert np.isfinite(prices).all()
    assert prices.max() < 1e9


def test_bars_are_the_same_one_by_one_or_at_once() -> None:
    whole = Market(4, 1_000, seed=9).run(50).values
    market = Market(4, 1_000, seed=9)
    np.testing.assert_array_equal(whole, np.stack([market.step() for _ in range(50)]))
    assert not np.array_equal(whole, Market(4, 1_000, seed=10).run(50).values)


def test_forks_share_the_past_but_not_the_future() -> None:
    market = Market(4, 60_000, seed=11)
    market.run(100)
    one, other = market.fork(1).run(5).values, market.fork(2).run(5).values
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, market.fork(1).run(5).values)


def test_aggregated_bars_equal_their_seconds() -> None:
    seconds = Market(3, 1_000, seed=12).run(185)
    minutes = aggregate(seconds, 60)
    assert minutes.values.shape == (3, 3, 6)
    first = seconds.values[:60]
    np.testing.assert_array_equal(minutes.values[0, :, 0], first[0, :, 0])
    np.testing.assert_array_equal(minutes.values[0, :, 1], first[..., 1].max(0))
    np.testing.assert_array_equal(minutes.values[0, :, 2], first[..., 2].min(0))
    np.testing.assert_array_equal(minutes.values[0, :, 3], first[-1, :, 3])
    np.testing.assert_allclose(minutes.values[0, :, 4], first[..., 4].sum(0))
    assert minutes.times.tolist() == seconds.times[[0, 60, 120]].tolist()


def test_invalid_market_is_rejected() -> None:
    with pytest.raises(ValueError, match="symbol"):
        Market(0)
    with pytest.raises(ValueError, match="open of a bar"):
        Market(1, 60_000, start_ms=1)
