"""Contexts: validation errors, time stamps, continuation by the timeframe, anchor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kronos_stream import Context, ContextError, Forecaster
from kronos_stream.engine.context import prepare, utc_offsets
from kronos_stream.model.inputs import denormalise, fill_missing_channels, normalise, time_stamps

Walks = Callable[..., list[Context]]

NAME = "test:0/0:5m"
BAR_7 = r"bar 7 \(2023-11-14T22:50:00Z\)"
ZONES = ["UTC", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "Pacific/Chatham"]


def ms(*times: str) -> list[int]:
    return [round(pd.Timestamp(time).timestamp() * 1000) for time in times]


def pandas_stamps(times: NDArray[np.int64], zone: str) -> NDArray[np.int64]:
    """Return the five columns as the reference reads them from pandas."""
    local = pd.DatetimeIndex(pd.to_datetime(times, unit="ms", utc=True)).tz_convert(zone)
    columns = (local.minute, local.hour, local.day_of_week, local.day, local.month)
    return np.stack([np.asarray(column) for column in columns], axis=-1).astype(np.int64)


def with_value(context: Context, row: int, column: int, value: float) -> Context:
    values = np.array(context.values)
    values[row, column] = value
    return replace(context, values=values)


CHANNELS = ["open", "high", "low", "close", "volume", "amount"]


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_every_value_must_be_finite(make_contexts: Walks, column: int, value: float) -> None:
    """NaN, infinity and float32 overflow are rejected, naming channel, bar and series."""
    (context,) = make_contexts([30])
    wanted = rf"^{NAME}: {CHANNELS[column]} of {BAR_7} is -?(nan|inf);"
    with pytest.raises(ContextError, match=wanted):
        prepare(with_value(context, 7, column, value), 0, 4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"values": np.ones((30, 7))}, r"must be \(30, 6\).*got shape \(30, 7\)"),
    ({"values": np.ones((30, 3))}, r"got shape \(30, 3\)"),
    ({"values": np.ones((29, 6))}, r"got shape \(29, 6\)"),
    ({"values": np.ones(30)}, r"got shape \(30,\)"),
    ({"values": np.full((30, 6), "1.0")}, "must be numbers, not <U3"),
    ({"values": np.ones((30, 6), complex)}, "must be numbers, not complex128"),
    ({"times": np.arange(30) * 0.5}, "times must be integer ms UTC, not float64"),
    ({"times": ["2024-01-01"] * 30}, "times must be integer ms UTC, not <U10"),
    ({"times": np.ones((30, 1), int)}, r"times has shape \(30, 1\)"),
    ({"times": [1], "values": np.ones((1, 6))}, r"at least 2 bars are needed"),
    ({"times": [], "values": np.ones((0, 6))}, r"at least 2 bars are needed"),
    ({"times": 1_700_000_000_000_000 + np.arange(30)}, "times must be ms since 1970, not us or ns"),
    ({"future_times": 2**42 * 1000 + np.arange(4)}, "future_times must be ms since 1970"),
    ({"timeframe": "5min"}, "timeframe '5min': expected a count and a unit"),
    ({"timeframe": None, "times": np.arange(30)}, "no timeframe has bars 1 ms apart"),
    ({"timezone": "Mars/Olympus"}, "unknown time zone 'Mars/Olympus'"),
    ({"timezone": "Europe"}, "unknown time zone 'Europe'"),
    ({"timezone": ""}, "unknown time zone ''"),
    ({"future_times": [2**42, 2**42 + 1]}, r"future_times has shape \(2,\), the horizon is 4 bars"),
    ({"future_times": ["a", "b", "c", "d"]}, "future_times must be integer ms UTC, not <U1"),
    ({"future_times": [1.7e12, 1.8e12, 1.9e12, 2e12]}, "must be integer ms UTC, not float64"),
    (
        {"future_times": [1_700_009_100_000, 1_700_009_100_000, 2**42, 2**43]},
        r"after the last bar \(2023-11-15T00:40:00Z\); entry 1 is 2023-11-15T00:45:00Z",
    ),
    ({"future_times": [1_700_008_800_000, 2**42, 2**43, 2**44]}, "entry 0 is 2023-11-15T00:40:00Z"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_invalid_contexts_are_rejected(
    make_contexts: Walks, change: dict[str, Any], message: str
) -> None:
    """Each invalid context is rejected in one line that starts with the series."""
    (context,) = make_contexts([30])
    with pytest.raises(ContextError, match=message) as caught:
        prepare(replace(context, **change), 0, 4)
    assert str(caught.value).startswith(f"{NAME}: ")
    assert "\n" not in str(caught.value)


def test_impossible_candles_are_rejected(make_contexts: Walks) -> None:
    """High below low, negative volume and negative amount name the bar."""
    (context,) = make_contexts([30])
    for column, value, wanted in (
        (1, 1.0, "high 1 is below low"),
        (4, -2.0, "volume -2 is negative"),
        (5, -0.5, "amount -0.5 is negative"),
    ):
        with pytest.raises(ContextError, match=f"impossible candle at {BAR_7}: {wanted}"):
            prepare(with_value(context, 7, column, value), 0, 4)


@pytest.mark.parametrize("swap", [(6, 7), (7, 7)])
def test_times_must_increase(make_contexts: Walks, swap: tuple[int, int]) -> None:
    """A repeated or earlier time is rejected with both bars' times."""
    (context,) = make_contexts([30])
    times = np.array(context.times)
    times[6] = times[swap[1]]
    with pytest.raises(ContextError, match=f"{NAME}: times must.*{BAR_7} does not follow bar 6"):
        prepare(replace(context, times=times), 0, 4)


def test_nameless_contexts_are_named_by_their_index(
    tiny_forecaster: Forecaster, make_contexts: Walks
) -> None:
    """In every error, including that of the window."""
    good, bad = make_contexts([30, 30], named=False)
    with pytest.raises(ContextError, match=r"^context 1: close of bar 7"):
        tiny_forecaster.sample([good, with_value(bad, 7, 3, np.nan)], 4, 1)
    (long,) = make_contexts([120], named=False)
    wanted = "^context 1: 120 bars and a horizon of 9 exceed max_context 128; give at most 119 bars"
    with pytest.raises(ContextError, match=wanted):
        tiny_forecaster.sample([good, long], 9, 1)
    with pytest.raises(ContextError, match=f"^{NAME}: 120 bars"):
        tiny_forecaster.sample(make_contexts([120]), 9, 1)


def test_a_constant_series_can_be_forecast(tiny_forecaster: Forecaster) -> None:
    """Without any spread forecasts stay within 1e-3 of the level."""
    context = Context(np.full((40, 4), 7.25), np.arange(40) * 60_000)
    (paths,) = tiny_forecaster.sample([context], 5, paths=4)
    np.testing.assert_allclose(paths[..., :4], 7.25, atol=1e-3)
    np.testing.assert_allclose(paths[..., 4:], 0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e5, 1e14])
def test_tiny_and_huge_units_stay_finite(
    tiny_forecaster: Forecaster, make_contexts: Walks, scale: float
) -> None:
    """Tiny and huge units stay finite, and huge ones scale the forecast."""
    (context,) = make_contexts([60])
    values = np.array(context.values)
    (scaled,) = tiny_forecaster.sample([replace(context, values=values * scale)], 5, paths=4)
    (plain,) = tiny_forecaster.sample([context], 5, paths=4)
    assert np.isfinite(scaled).all()
    if scale > 1:
        np.testing.assert_allclose(scaled / scale, plain, rtol=1e-3)


def test_a_spread_whose_square_overflows_is_rejected(make_contexts: Walks) -> None:
    """The forecast would be infinite; the error names the remedy."""
    (context,) = make_contexts([30])
    values = np.array(context.values)
    values[:, 4] *= 1e20
    values[:, 5] = 1
    with pytest.raises(ContextError, match=f"{NAME}: volume is too large.*use a larger unit"):
        prepare(replace(context, values=values), 0, 4)


def test_missing_columns_are_filled(make_contexts: Walks) -> None:
    """Five columns: amount is volume x mean price. Four: volume and amount are 0."""
    (context,) = make_contexts([30])
    values = np.array(context.values, np.float32)
    full = fill_missing_channels(values[:, :5])
    np.testing.assert_array_equal(full[:, :5], values[:, :5])
    np.testing.assert_allclose(full[:, 5], values[:, 4] * values[:, :4].mean(1), rtol=1e-6)
    for columns in (4, 5):
        got = prepare(replace(context, values=values[:, :columns]), 0, 4)
        want = prepare(replace(context, values=fill_missing_channels(values[:, :columns])), 0, 4)
        np.testing.assert_array_equal(got.normalised, want.normalised)
    assert (fill_missing_channels(values[:, :4])[:, 4:] == 0).all()


def test_normalisation_round_trip(make_contexts: Walks) -> None:
    """Over the whole window, ddof 0, clipped at 5; undone where nothing was clipped."""
    values = np.array(make_contexts([100])[0].values, np.float32)
    values[50, 4] = 1e6
    mean, std, scaled = normalise(values)
    exact = values.astype(np.float64)
    wanted = (exact - exact.mean(0)) / (exact.std(0) + 1e-5)
    np.testing.assert_allclose(scaled, np.clip(wanted, -5, 5), atol=1e-4)
    assert scaled[50, 4] == 5
    kept = np.abs(wanted) < 5
    np.testing.assert_allclose(denormalise(scaled, mean, std)[kept], values[kept], rtol=1e-2)


@given(
    st.lists(st.integers(-(10**12), 4 * 10**12), min_size=1, max_size=50), st.sampled_from(ZONES)
)
def test_time_stamps_equal_those_of_pandas(times: list[int], zone: str) -> None:
    """Minute, hour, weekday, day and month from 1938 to 2096, in zones with different rules."""
    array = np.array(times, dtype=np.int64)
    np.testing.assert_array_equal(
        time_stamps(array + utc_offsets(array, zone)), pandas_stamps(array, zone)
    )


@pytest.mark.parametrize("day", ["2026-03-08", "2026-11-01"])
def test_time_stamps_across_clock_changes(day: str) -> None:
    """Both days on which New York's clocks change, minute by minute."""
    (start,) = ms(f"{day}T00:00Z")
    times = start + 60_000 * np.arange(1440)
    stamps = time_stamps(times + utc_offsets(times, "America/New_York"))
    np.testing.assert_array_equal(stamps, pandas_stamps(times, "America/New_York"))
    offsets = (np.arange(1440) // 60 - stamps[:, 1]) % 24
    assert set(offsets) == {4, 5}


def test_the_horizon_continues_by_the_timeframe(tiny_forecaster: Forecaster) -> None:
    """Calendar months of any length, also with an inferred timeframe."""
    values = np.arange(24.0)[:, None] + np.array([1, 2, 0, 1, 1, 1])
    months = pd.date_range("2023-01-01", periods=24, freq="MS", tz="UTC").as_unit("ms")
    context = Context(values, months.tz_localize(None).to_numpy(), timeframe="1M")
    (draw,) = tiny_forecaster.draw([context], 3, 1)
    assert draw.times.tolist() == ms("2025-01-01T00Z", "2025-02-01T00Z", "2025-03-01T00Z")
    (draw,) = tiny_forecaster.draw([replace(context, timeframe=None)], 2, 1)
    assert draw.times.tolist() == ms("2025-01-01T00Z", "2025-02-01T00Z")
    sessions = ms("2025-01-02T09:30Z", "2025-01-03T09:30Z", "2025-01-06T09:30Z")
    (draw,) = tiny_forecaster.draw([replace(context, future_times=sessions)], 2, 1)
    assert draw.times.tolist() == sessions[:2]


def test_datetime64_times_are_ms(tiny_forecaster: Forecaster, make_contexts: Walks) -> None:
    """Times in any datetime64 unit, past and future, equal those in ms."""
    (context,) = make_contexts([30])
    past = np.array(context.times)
    future = past[-1] + 86_400_000 * np.arange(1, 5)
    (wanted,) = tiny_forecaster.sample([replace(context, future_times=future)], 4, 2)
    for unit in ("s", "ms", "ns"):
        times, ahead = (t.astype("datetime64[ms]").astype(f"M8[{unit}]") for t in (past, future))
        (got,) = tiny_forecaster.sample([replace(context, times=times, future_times=ahead)], 4, 2)
        np.testing.assert_array_equal(got, wanted)


def test_time_zones_and_future_times_reach_the_model(
    tiny_forecaster: Forecaster, make_contexts: Walks
) -> None:
    """The requested time stamps change the forecast."""
    (context,) = make_contexts([30])
    (plain,) = tiny_forecaster.sample([context], 4, 1, top_k=1)
    elsewhere = replace(context, timezone="Asia/Tokyo")
    later = replace(context, future_times=2**41 + 3_600_000 * np.arange(4))
    for other in (elsewhere, later):
        (paths,) = tiny_forecaster.sample([other], 4, 1, top_k=1)
        assert not np.array_equal(paths, plain)


def test_inputs_are_not_modified(tiny_forecaster: Forecaster, make_contexts: Walks) -> None:
    """Read-only arrays are accepted, also float32 arrays, which are read without a copy."""
    (context,) = make_contexts([30])
    values, times = np.array(context.values, np.float32), np.array(context.times)
    before = values.copy()
    paths = []
    for writable in (True, False):
        values.flags.writeable = times.flags.writeable = writable
        given_now = replace(context, values=values, times=times)
        paths.append(tiny_forecaster.sample([given_now], 4, 2, anchor=True)[0])
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(paths[0], paths[1])


def test_anchor_scales_prices_only(
    tiny_forecaster: Forecaster, parity_cases: dict[str, NDArray[Any]]
) -> None:
    """Prices are scaled by actual / decoded close of the origin; volume and amount are not."""
    contexts = [
        Context(parity_cases[f"ohlcva_{i}"][:96], parity_cases[f"time_{i}"][:96] * 1000)
        for i in range(3)
    ]
    plain = tiny_forecaster.sample(contexts, 8, 3, top_k=1)
    anchored = tiny_forecaster.sample(contexts, 8, 3, top_k=1, anchor=True)
    for i, (one, other) in enumerate(zip(plain, anchored, strict=True)):
        values = parity_cases[f"ohlcva_{i}"][:96].astype(np.float32)
        mean, std, _ = normalise(values)
        decoded = denormalise(parity_cases["decoded"][i, -1], mean, std)[3]
        scale = values[-1, 3] / decoded
        assert scale != 1
        np.testing.assert_allclose(other[..., :4], one[..., :4] * scale, rtol=1e-5)
        np.testing.assert_array_equal(other[..., 4:], one[..., 4:])
