"""The symbols file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kronos_stream.daemon.config.settings import Settings, SettingsError
from kronos_stream.market.watchlist import WatchlistEntry

_BTC = WatchlistEntry.parse("binance:BTC/USDT")


def _symbols(settings: Settings) -> list[str]:
    return [series.symbol for series in settings.series()]


def test_file_is_read_again_each_time(tmp_path: Path) -> None:
    file = tmp_path / "symbols"
    file.write_text("# majors\nbinance:ETH/USDT\n\n  binance:SOL/USDT  # comment\n")
    settings = Settings(symbols=(_BTC,), symbols_file=file)
    assert _symbols(settings) == ["BTC/USDT", "ETH/USDT", "SOL/USDT"]
    file.write_text("binance:ADA/USDT\n")
    assert _symbols(settings) == ["BTC/USDT", "ADA/USDT"]
    assert _symbols(Settings(symbols_file=file)) == ["ADA/USDT"]


def test_each_invalid_line_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "symbols"
    file.write_text("binance:A\nwhat\nbinance:A\nbinance:BTC/USDT\n")
    with pytest.raises(SettingsError) as raised:
        Settings(symbols=(_BTC,), symbols_file=file).series()
    prefix = f"KRONOS_STREAM_SYMBOLS_FILE={file}, line"
    invalid, repeated, listed = raised.value.problems
    assert invalid.startswith(f"{prefix} 2: 'what': expected venue:symbol")
    assert repeated == f"{prefix} 3: binance:A is listed twice"
    assert listed == f"{prefix} 4: binance:BTC/USDT is listed twice"


def test_long_lines_and_long_lists_of_problems_are_shortened(tmp_path: Path) -> None:
    file = tmp_path / "symbols"
    settings = Settings(symbols_file=file)
    file.write_text("x" * 500_000)
    with pytest.raises(SettingsError, match="is too long: 500,000 characters"):
        settings.watchlist()
    file.write_text("nonsense\n" * 25)
    with pytest.raises(SettingsError) as raised:
        settings.watchlist()
    assert len(raised.value.problems) == 21
    assert raised.value.problems[-1].endswith(": and 5 more lines")
