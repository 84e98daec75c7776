# SPDX-License-Identifier: GPL-3.0-or-later
#
# A strategy is part of freqtrade when it runs, and freqtrade is under the GNU General Public
# License, version 3 or later; so is this file, other than the rest of kronos-stream, which it is
# no part of. The licence: https://www.gnu.org/licenses/gpl-3.0.html
"""A freqtrade strategy that enters and leaves by forecasts from Kafka.

Install kronos-stream beside freqtrade, copy this file into ``user_data/strategies``, and say in
freqtrade's configuration where the forecasts are::

    "kronos": {"bootstrap": "localhost:9092", "venue": "binance"}

``venue`` may be left out if it is called like the exchange. The daemon must follow the same pairs
in the same timeframe. Only for dry runs and live ones: a backtest sees no forecasts, and so does
nothing. It shows how; whether it earns anything is for you to find out.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any, ClassVar

import pandas as pd
from freqtrade.enums import TRADE_MODES
from freqtrade.exchange import timeframe_to_seconds
from freqtrade.strategy import IStrategy

from kronos_stream.client import Forecast, forecasts

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


class KronosForecasts(IStrategy):
    """Long where a rise is likely, by a fresh forecast of sound bars; else nothing is entered.

    Without one no exit is signalled either: open trades are left to the stop loss.
    """

    INTERFACE_VERSION = 3
    timeframe = "5m"
    can_short = False
    stoploss = -0.03
    minimal_roi: ClassVar[dict[str, float]] = {}
    # A forecast comes a moment after its bar, so the newest bar is looked at more than once.
    process_only_new_candles = False

    enter_above = 0.6
    exit_below = 0.45

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        told = config.get("kronos", {})
        self._bootstrap = told.get("bootstrap", "localhost:9092")
        self._venue = told.get("venue", config["exchange"]["name"])
        self._latest: dict[str, Forecast] = {}
        self._reading: Future[None] | None = None

    def bot_start(self, **_: object) -> None:
        """Begin to read forecasts, in a thread of their own."""
        if self.dp.runmode in TRADE_MODES:
            loop = asyncio.new_event_loop()
            Thread(target=loop.run_forever, name="kronos-forecasts", daemon=True).start()
            self._reading = asyncio.run_coroutine_threadsafe(self._read(), loop)

    def ft_bot_cleanup(self) -> None:
        """End it: a reloaded configuration makes another strategy."""
        super().ft_bot_cleanup()
        if self._reading is not None:
            self._reading.cancel()

    def populate_indicators(
        self, dataframe: pd.DataFrame, metadata: dict[str, Any]
    ) -> pd.DataFrame:
        """Column ``p_up``: the chance of a rise from the bar the forecast is of; else not a number.

        A forecast of any bar but the newest thus signals nothing.
        """
        dataframe["p_up"] = float("nan")
        forecast = self._fresh(metadata["pair"], datetime.now(UTC))
        if forecast is not None:
            origin = pd.Timestamp(forecast.origin)
            dataframe.loc[dataframe["date"] == origin, "p_up"] = forecast.summary.p_up
        return dataframe

    def populate_entry_trend(
        self, dataframe: pd.DataFrame, metadata: dict[str, Any]
    ) -> pd.DataFrame:
        """Enter where the chance is good."""
        dataframe.loc[dataframe["p_up"] > self.enter_above, "enter_long"] = 1
        return dataframe

    def populate_exit_trend(
        self, dataframe: pd.DataFrame, metadata: dict[str, Any]
    ) -> pd.DataFrame:
        """Leave where it is not."""
        dataframe.loc[dataframe["p_up"] < self.exit_below, "exit_long"] = 1
        return dataframe

    def confirm_trade_entry(self, pair: str, current_time: datetime, **_: object) -> bool:
        """Whether the forecast is still good when the order would go out."""
        return self._fresh(pair, current_time) is not None

    def _fresh(self, pair: str, now: datetime) -> Forecast | None:
        forecast = self._latest.get(f"{self._venue}:{pair}:{self.timeframe}")
        if forecast is None or forecast.degraded or forecast.valid_until <= now:
            return None
        return forecast

    async def _read(self) -> None:
        """Keep the latest forecast of each series, until cancelled."""
        # Those of the last bars may still be valid.
        lately = timedelta(seconds=2 * timeframe_to_seconds(self.timeframe))
        try:
            while True:
                stream = forecasts(self._bootstrap, start=datetime.now(UTC) - lately)
                try:
                    async with aclosing(stream):
                        async for forecast in stream:
                            self._latest[forecast.series] = forecast
                except Exception:
                    logger.exception("no forecasts; tried again in %g s", RETRY_SECONDS)
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            asyncio.get_running_loop().stop()
