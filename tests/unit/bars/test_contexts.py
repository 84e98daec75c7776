"""Contexts: windows of the newest bars, and the reasons why they are degraded."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from kronos_stream.bars.contexts import ContextBuffer
from kronos_stream.bars.window import build_window
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.series import Series
from kronos_stream.model.inputs import fill_missing_channels, normalise

SERIES = Series.parse("binance:BTC/USDT:1m")
MINUTE = 60_000


def random_bars(count: int, *, scale: float = 100.0, amount: bool = True) -> list[Bar]:
    random = Random(count)
    bars = []
    price = scale
    for i in range(count):
        close = price * random.uniform(0.99, 1.01)
        high, low = max(price, close) * 1.001, min(price, close) * 0.999
        volume = random.uniform(1, 2)
        turnover = volume * close if amount else None
        bars.append(Bar(Candle(i * MINUTE, price, high, low, close, volume, turnover), received=1))
        price = close
    return bars


def make_context(bars: list[Bar]) -> ContextBuffer:
    context = ContextBuffer(SERIES, 50)
    for bar in bars:
        context.append(bar)
    return context


@pytest.mark.parametrize("count", [1, 40, 49, 50, 51, 56, 57, 58, 300])
def test_window_has_the_newest_bars_up_to_its_origin(count: int) -> None:
    bars = random_bars(count)
    context = make_context(bars)
    for back in (0, 5, 9):
        if back >= count:
            break
        part = bars[max(0, count - back - 40) : count - back]
        window = context.window(part[-1].candle.time, 40)
        assert window is not None
        np.testing.assert_array_equal(
            window.values, np.array([bar.candle[1:] for bar in part], np.float32)
        )
        assert window.times.tolist() == [bar.candle.time for bar in part]
        assert window.last == part[-1].candle  # in full precision
        assert window.reasons == ()


def test_window_is_a_copy() -> None:
    bars = random_bars(80)
    context = make_context(bars)
    window = context.window(bars[-1].candle.time, 40)
    assert window is not None
    before = window.values.copy()
    for bar in random_bars(80):
        context.append(bar._replace(candle=bar.candle._replace(close=1.0)))
    np.testing.assert_array_equal(window.values, before)


def test_window_that_is_not_completely_stored_is_none() -> None:
    bars = random_bars(300)
    context = make_context(bars)
    assert context.window(bars[100].candle.time, 40) is None
    assert context.window(bars[-1].candle.time + 1, 40) is None
    assert context.window(bars[-1].candle.time + MINUTE, 40) is None
    # The series has older bars than were loaded, so a shorter window would be wrong.
    context = ContextBuffer(SERIES, 50, bars[-50:], complete=False)
    assert context.window(bars[-20].candle.time, 40) is None
    assert context.window(bars[-1].candle.time, 40) is not None


def test_revision_replaces_its_bar() -> None:
    bars = random_bars(60)
    context = make_context(bars)
    changed = Bar(bars[-3].candle._replace(volume=9.0), revision=2, received=5)
    context.revise(changed)
    context.revise(Bar(bars[0].candle, revision=7))  # no longer stored
    window = context.window(changed.candle.time, 40)
    assert window is not None
    assert window.revision == 2
    assert window.last.volume == 9.0
    newest = context.window(bars[-1].candle.time, 40)
    assert newest is not None
    assert newest.values[-3, 4] == 9.0
    assert newest.revision == 0


def test_bar_without_amount_drops_the_column() -> None:
    bars = random_bars(60)
    bars[-10] = Bar(bars[-10].candle._replace(amount=None), received=1)
    context = make_context(bars)
    window = context.window(bars[-1].candle.time, 40)
    assert window is not None
    assert window.values.shape == (40, 5)
    assert window.values.flags.c_contiguous
    assert window.last.amount == bars[-1].candle.amount
    without = context.window(bars[-10].candle.time, 5)
    assert without is not None
    assert without.last.amount is None
    before = context.window(bars[-11].candle.time, 5)
    assert before is not None
    assert before.values.shape == (5, 6)


def test_synthetic_and_missing_bars_are_counted_and_reported() -> None:
    bars = random_bars(60)
    for i in (-2, -5, -9):
        bars[i] = bars[i]._replace(synthetic=True)
    bars[-12] = bars[-12]._replace(synthetic=True, received=0)
    context = make_context(bars)
    window = context.window(bars[-1].candle.time, 40)
    assert window is not None
    assert window.synthetic == 4
    assert window.reasons == ("3 synthetic bars", "1 missing bar")
    assert context.skip_reason(40, strict=True) == "gap"
    assert context.skip_reason(40, strict=False) is None
    assert context.skip_reason(10, strict=True) is None


@pytest.mark.parametrize("amount", [True, False])
@pytest.mark.parametrize("column", [1, 2, 3, 4])
def test_clipping_is_reported_where_the_model_clips(column: int, amount: bool) -> None:  # noqa: FBT001
    seen = set()
    for factor in np.linspace(1, 8, 60):
        bars = random_bars(60, amount=amount)
        last = list(bars[-1].candle)
        others = np.array([bar.candle[column] for bar in bars[:-1]], np.float64)
        last[column] = float(others.mean() + factor * others.std())
        bars[-1] = Bar(Candle(*last), received=1)  # type: ignore[arg-type]
        window = build_window(SERIES, bars)
        # Model input before clipping.
        z = normalise(fill_missing_channels(window.values), clip=np.inf)[2][-1]
        if np.abs(np.abs(z) - 5).min() > 1e-3:
            clipped = bool((np.abs(z) > 5).any())
            assert ("last bar clipped" in window.reasons) == clipped
            seen.add(clipped)
    assert seen == {True, False}


def test_clipping_of_tiny_prices_is_checked_after_scaling() -> None:
    """Prices that hardly move are scaled by a power of two before normalisation."""
    bars = random_bars(200, scale=1e-6)
    assert build_window(SERIES, bars).reasons == ()
    bars[-1] = Bar(bars[-1].candle._replace(high=1e-4), received=1)
    assert build_window(SERIES, bars).reasons == ("last bar clipped",)


def test_buffer_of_a_series_is_small() -> None:
    buffer = ContextBuffer(SERIES, 552, random_bars(600))
    columns = (buffer._values, buffer._times, buffer._revisions, buffer._kinds)
    assert sum(column.nbytes for column in columns) < 45_000
