"""The table of ``kronos-stream tail``: rows, columns and bands."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from kronos_stream.commands import _forecast_table
from kronos_stream.commands._forecast_table import ForecastTable
from tests.support.forecast_messages import BTC, ETH, MINUTE, START, make_forecast_message


def _rendered(
    table: ForecastTable, now: int, height: int = 30, *, width: int = 140, color: bool = False
) -> str:
    console = Console(width=width, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as captured:
        console.print(table.render(now, width, height))
    return captured.get()


def _rows(text: str) -> list[list[str]]:
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return [row for row in found if row]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_narrow_table_omits_columns_without_truncation(width: int) -> None:
    table = ForecastTable("here", newest_first=False)
    table.add(make_forecast_message(BTC))
    (row,) = _rows(_rendered(table, START, width=width))
    assert row[0] == BTC
    assert "…" not in "".join(row)
    assert "50" in row, "the median"
    assert len(row) == {60: 6, 80: 8, 100: 9, 120: 9}[width]


def test_row_shows_the_newest_forecast_of_a_series() -> None:
    table = ForecastTable("here", newest_first=False)
    for origin in (START, START + MINUTE, START):
        table.add(make_forecast_message(ETH, origin))
    table.add(make_forecast_message(BTC, degraded=True))
    text = _rendered(table, START + 90_000)
    assert "here: 4 forecasts of 2 series" in text
    assert [name.split() for name in re.findall(r"q\d+", text)] == [["q05"], ["q50"], ["q95"]]
    assert _rows(text) == [
        [BTC, "06-18 11:15:00", "42.5", "5", "50", "95", "0.62", "0.123%", "30 s", "degraded"],
        [ETH, "06-18 11:16:00", "42.5", "5", "50", "95", "0.62", "0.123%", "0 s", ""],
    ]


def test_expired_forecast_is_dim() -> None:
    table = ForecastTable("here", newest_first=False)
    table.add(make_forecast_message(BTC))
    table.add(make_forecast_message(ETH, START + MINUTE))
    lines = _rendered(table, START + 2 * MINUTE, color=True).splitlines()
    assert {
        name: any("\x1b[2m" in line and name in line for line in lines) for name in (BTC, ETH)
    } == {
        BTC: True,
        ETH: False,
    }


def test_rows_are_sorted_and_fit_the_height() -> None:
    names = [f"binance:S{i:02}/USDT:1m" for i in range(20)]
    for newest_first in (False, True):
        table = ForecastTable("here", newest_first=newest_first)
        for i, name in enumerate(names):
            table.add(make_forecast_message(name, START + i * MINUTE))
        shown = [row[0] for row in _rows(_rendered(table, START, height=11))]
        assert shown == (names[:-6:-1] if newest_first else names[:5])
        text = _rendered(table, START, height=11)
        assert "and 15 more" in text
        assert len(text.splitlines()) <= 11


@pytest.mark.parametrize(
    ("bands", "shown"),
    [
        (("q05", "q25", "q50", "q75", "q95"), ("q05", "q50", "q95")),
        (("q01", "q99"), ("q01", "mean", "q99")),
        (("q10", "q50", "q90"), ("q10", "q50", "q90")),
    ],
)
def test_bands_are_the_usual_or_the_outermost(bands: Sequence[str], shown: Sequence[str]) -> None:
    forecast = make_forecast_message(bands=bands)
    assert _forecast_table.band_names(forecast) == shown
    table = ForecastTable("here", newest_first=False)
    table.add(forecast)
    assert all(name in _rendered(table, START) for name in shown)
    table.add(make_forecast_message(ETH, bands=("q20", "q80")))
    assert all(name in _rendered(table, START) for name in ("low", "middle", "high"))
    assert "mean" not in _forecast_table.format_line(make_forecast_message(bands=("q50",)))


@pytest.mark.parametrize(
    ("seconds", "age"), [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (9_000, "2 h"), (2e6, "23 d")]
)
def test_ages_are_short(seconds: float, age: str) -> None:
    assert _forecast_table._format_age(1000 * seconds) == age
