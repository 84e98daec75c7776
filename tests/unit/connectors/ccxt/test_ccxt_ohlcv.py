"""Interpretation of ccxt's rows, errors, markets and settings, without connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from kronos_connectors.ccxt import CONNECTOR, CcxtOptions
from kronos_connectors.ccxt.errors import HttpStatusError, SeriesRefused, translate_error
from kronos_connectors.ccxt.markets import inactive, unsupported_reason
from kronos_connectors.ccxt.ohlcv import Page, Paginator, PushDiff, RowError, read_row
from kronos_stream.interfaces.source import SourceError, VenueRefused
from kronos_stream.market.candle import Candle
from kronos_stream.market.clock import ManualClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

MINUTE = 60_000
START = 29_166_667 * MINUTE


def row(time: int, close: float = 2.0) -> list[float]:
    return [time, 1.0, 3.0, 1.0, close, 5.0]


# -- rows ----------------------------------------------------------------------------------


def test_row_is_read_as_candle_without_amount() -> None:
    assert read_row(row(START)) == Candle(START, 1.0, 3.0, 1.0, 2.0, 5.0, None)
    assert read_row([float(START), 1, 3, 1, 2, 5]) == read_row(row(START))


def test_row_without_prices_is_no_bar() -> None:
    assert read_row([START, None, None, None, None, 0]) is None


@pytest.mark.parametrize(
    "wrong",
    [None, "candle", [], [START, 1, 2, 3], [None, 1, 3, 1, 2, 5], [-1, 1, 3, 1, 2, 5],
     [START + 0.5, 1, 3, 1, 2, 5], [START, 1, 3, 1, None, 5], [START, "1", 3, 1, 2, 5],
     [START, 1, 3, 1, 2, None], [True, 1, 3, 1, 2, 5]],
)  # fmt: skip
def test_invalid_row_raises(wrong: object) -> None:
    with pytest.raises(RowError):
        read_row(wrong)


def times(candles: Sequence[Candle]) -> list[int]:
    return [(candle.time - START) // MINUTE for candle in candles]


def test_push_diff_returns_the_newest_and_changed_candles() -> None:
    pushed, now = PushDiff(), START + 3 * MINUTE
    rows = [row(START + i * MINUTE) for i in range(3)]
    assert times(pushed.changed(rows[:2], now)) == [0, 1]
    assert times(pushed.changed(rows[:2], now)) == [1]
    assert times(pushed.changed(rows, now)) == [2]
    rows[1] = row(START + MINUTE, 2.5)
    assert times(pushed.changed(rows[::-1], now)) == [1, 2]
    assert pushed.changed([], now) == []


def test_push_diff_skips_invalid_rows_and_raises_without_others() -> None:
    nonsense: list[object] = [row(START + 10 * MINUTE), [None, 1, 3, 1, 2, 5]]
    assert times(PushDiff().changed([*nonsense, row(START)], START + 5)) == [0]
    assert PushDiff().changed(nonsense[:1], START + 5) == []
    with pytest.raises(RowError):
        PushDiff().changed(nonsense, START + 5)


# -- pages ---------------------------------------------------------------------------------

Answer = Callable[[Sequence[int], Page], Sequence[int]]


def plainly(bars: Sequence[int], page: Page) -> Sequence[int]:
    return [bar for bar in bars if bar >= page.since][: page.limit]


def by_time(bars: Sequence[int], page: Page) -> Sequence[int]:
    return [bar for bar in bars if page.since <= bar < page.since + page.limit * MINUTE]


def newest_only(bars: Sequence[int], page: Page) -> Sequence[int]:
    return [bar for bar in bars[-720:] if bar >= page.since]


def backwards(bars: Sequence[int], page: Page) -> Sequence[int]:
    return [bar for bar in plainly(bars, page) if bar >= page.since][::-1]


def from_before(bars: Sequence[int], page: Page) -> Sequence[int]:
    before = [bar for bar in bars if bar < page.since][-2:]
    return [*before, *plainly(bars, page)][: page.limit + 2]


@pytest.mark.parametrize("answer", [plainly, by_time, newest_only, backwards, from_before])
@pytest.mark.parametrize("seed", range(20))
def test_history_is_complete_however_pages_are_interpreted(answer: Answer, seed: int) -> None:
    random = Random(seed)
    # Long times without trades among them, the last bar open.
    bars = [START + i * MINUTE for i in range(700) if i % 100 < 40 and random.random() < 0.7]
    now = bars[-1] + 30_000
    start, end = START + random.randrange(400) * MINUTE, now + random.randrange(-200, 3) * MINUTE
    pages = Paginator(Timeframe(1, "m"), start, min(end, now), random.choice((2, 50, 300, 1_000)))
    asked = 0
    while (page := pages.next_page()) is not None:
        pages.add(page, [row(bar) for bar in answer(bars, page)], now)
        asked += 1
        assert asked < 1_000
    wanted = [bar for bar in bars if start <= bar < min(end, now) and bar + MINUTE <= now]
    assert [candle.time for candle in pages.candles] == wanted


def test_open_bar_is_left_out() -> None:
    pages = Paginator(Timeframe(1, "m"), START, START + 2 * MINUTE, 100)
    page = pages.next_page()
    assert page == Page(START, 3)
    pages.add(page, [row(START), row(START + MINUTE)], START + 2 * MINUTE - 1)
    assert [candle.time for candle in pages.candles] == [START]
    assert pages.next_page() is None


def test_months_are_paged_by_the_calendar() -> None:
    month = Timeframe(1, "M")
    opens = [month.after(1_704_067_200_000, n) for n in range(30)]
    pages = Paginator(month, opens[0], opens[-1], 7)
    while (page := pages.next_page()) is not None:
        found = [row(time) for time in opens if time >= page.since][: page.limit]
        pages.add(page, found, opens[-1])
    assert [candle.time for candle in pages.candles] == opens[:-1]


# -- errors --------------------------------------------------------------------------------


def ccxt_error(name: str, text: str) -> Exception:
    error = getattr(import_module("ccxt"), name)(text)
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "wait"),
    [
        (HttpStatusError(429, "", "17"), SourceError, 17.0),
        (HttpStatusError(418, "", None), SourceError, 60.0),
        (HttpStatusError(429, "", "soon"), SourceError, 60.0),
        (HttpStatusError(451, ""), VenueRefused, 0.0),
        (HttpStatusError(403, "<html>Forbidden"), SourceError, 600.0),
        (HttpStatusError(403, "not available in your country"), VenueRefused, 0.0),
        (("RateLimitExceeded", "x"), SourceError, 60.0),
        (("DDoSProtection", "x"), SourceError, 60.0),
        (("OnMaintenance", "x"), SourceError, 60.0),
        (("NetworkError", "x"), SourceError, 0.0),
        (("RequestTimeout", "x"), SourceError, 0.0),
        (("BadResponse", "x"), SourceError, 0.0),
        (("RestrictedLocation", "x"), VenueRefused, 0.0),
        (("PermissionDenied", "x"), VenueRefused, 0.0),
        (("AuthenticationError", "bad key"), VenueRefused, 0.0),
        (("ExchangeNotAvailable", "unavailable from a restricted location"), VenueRefused, 0.0),
        (("BadSymbol", "no such market"), SeriesRefused, 0.0),
        (("ExchangeError", "no"), SeriesRefused, 0.0),
        (("NotSupported", "no"), SeriesRefused, 0.0),
        (TypeError("ccxt fell over an answer"), SourceError, 0.0),
        (RowError("no row"), SourceError, 0.0),
    ],
)
def test_errors_are_classified(
    error: Exception | tuple[str, str], kind: type[SourceError], wait: float
) -> None:
    raised = ccxt_error(*error) if isinstance(error, tuple) else error
    found = translate_error(raised, "kraken")
    assert type(found) is kind
    assert found.retry_after == wait
    assert str(found).startswith("kraken: ")


def test_error_is_one_short_line_without_secrets() -> None:
    url = "GET https://x.test/y?apiKey=SESAME&signature=OPEN&symbol=A\n<html>" + 500 * "z"
    found = str(translate_error(ccxt_error("ExchangeError", url), "kraken"))
    assert "symbol=A" in found
    assert "SESAME" not in found
    assert "OPEN" not in found
    assert "\n" not in found
    assert len(found) < 300


def test_authentication_error_names_the_variable() -> None:
    found = translate_error(ccxt_error("AuthenticationError", "bad key"), "kraken")
    assert "KRONOS_STREAM_CCXT__CONFIG" in str(found)


# -- settings and markets ------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ['{"kraken": {"secret": "SESAME"', '["SESAME"]', '{"a": "SESAME"}']
)
def test_invalid_config_is_rejected_without_being_shown(text: str) -> None:
    with pytest.raises(ValidationError) as refused:
        CcxtOptions.model_validate({"config": text})
    messages = [error["msg"] for error in refused.value.errors(include_input=False)]
    assert "SESAME" not in str(messages)
    assert "JSON" in str(messages) or "object" in str(messages)


def test_config_is_by_exchange_and_never_printed() -> None:
    options = CcxtOptions.model_validate({"config": '{"kraken": {"secret": "SESAME"}}'})
    assert options.config_for("kraken") == {"secret": "SESAME"}
    assert options.config_for("kucoin") == {}
    assert "SESAME" not in repr(options)


MARKETS: dict[str, dict[str, Any]] = {
    "BTC/USDT": {"active": True},
    "BTC/USDC": {"active": None},
    "LUNA/USDT": {"active": False},
    "BTC/USD:BTC-251226": {"active": True, "expiry": 1, "expiryDatetime": "2025-12-26T08:00:00Z"},
}


@pytest.mark.parametrize(
    ("symbol", "timeframe", "why"),
    [
        ("BTC/USDT", "1m", None),
        ("LUNA/USDT", "1m", None),
        ("BTCUSDT", "1m", "kraken does not list it; did you mean BTC/USDT or BTC/USDC?"),
        ("luna/usd", "1m", "kraken does not list it"),
        ("BTC/USDT", "7m", "kraken has no bars of 7m, only 1m, 5m"),
        ("BTC/USD:BTC-251226", "1m", "it expires on 2025-12-26; only markets without expiry"),
    ],
)
def test_unsupported_series_is_explained(symbol: str, timeframe: str, why: str | None) -> None:
    series = Series.of("kraken", symbol, Timeframe.parse(timeframe))
    found = unsupported_reason(series, MARKETS, ("1m", "5m"), "kraken")
    assert (found or "").startswith(why or "")
    assert (found is None) == (why is None)


def test_market_is_inactive_only_if_marked() -> None:
    messages = {
        symbol: inactive(Series.of("k", symbol, Timeframe(1, "m")), MARKETS) for symbol in MARKETS
    }
    assert [symbol for symbol in messages if messages[symbol]] == ["LUNA/USDT"]


NO = "KRONOS_STREAM_CCXT__CONFIG: ccxt cannot create kraken with it: "
KIND = "KRONOS_STREAM_CCXT__CONFIG: kraken."


@pytest.mark.parametrize(
    ("asked", "settings", "why"),
    [
        ("ccxt.krakn", {}, "KRONOS_STREAM_SYMBOLS: ccxt has no exchange 'krakn'; did you mean k"),
        ("kraken", {"config": '{"krakn": {}}'}, "KRONOS_STREAM_CCXT__CONFIG: ccxt has no"),
        ("kraken", {"fills_empty": ("krakn",)}, "KRONOS_STREAM_CCXT__FILLS_EMPTY: ccxt has no"),
        *(
            ("kraken", {"config": f'{{"kraken": {{{wrong}}}}}'}, f"{KIND}{messages}")
            for wrong, messages in (
                ('"options": 7', "options: expected an object"),
                ('"options": []', "options: expected an object"),
                ('"urls": "https://x.y"', "urls: expected an object"),
                ('"rateLimit": "slow"', "rateLimit: expected a number"),
                ('"apiKey": 5', "apiKey: expected a string"),
                ('"httpsProxy": 5', "httpsProxy: expected a string"),
                ('"aiohttp_trust_env": "yes"', "aiohttp_trust_env: expected true or false"),
            )
        ),
        ("kraken", {"config": '{"kraken": {"sandbox": true}}'}, f"{NO}TypeError"),
        ("btcmarkets", {"mode": "watch"}, "KRONOS_STREAM_CCXT__MODE=watch: ccxt cannot watch"),
        ("paymium", {}, "KRONOS_STREAM_SYMBOLS: paymium has no history of candles in ccxt"),
    ],
)
def test_unsupported_settings_raise_at_the_start(
    asked: str, settings: dict[str, Any], why: str
) -> None:
    given = CcxtOptions.model_validate(settings)
    with pytest.raises(SourceError) as refused:
        CONNECTOR.build(asked, given, ManualClock(START), Random(1))
    assert str(refused.value).startswith(why)


def test_every_exchange_of_ccxt_is_created_or_raises_source_error() -> None:
    built = refused = 0
    for name in CONNECTOR.venues():
        try:
            source = CONNECTOR.build(name, CcxtOptions(), ManualClock(START), Random(1))
        except SourceError as error:
            assert "no history of candles" in str(error)  # noqa: PT017 - most can be built
            refused += 1
        else:
            assert source.traits.fills_empty is name.startswith("binance")
            built += 1
    assert built > 80
    assert refused < 30
