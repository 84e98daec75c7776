# SPDX-License-Identifier: GPL-3.0-or-later
#
# A strategy runs as part of freqtrade, which is under the GNU General Public License, version 3 or
# later. Therefore this file has the same licence. It is not part of kronos-stream, which has
# another licence. Text of the licence: https://www.gnu.org/licenses/gpl-3.0.html
"""Freqtrade strategy that enters and exits trades by forecasts from Kafka.

Install kronos-stream beside freqtrade, copy this file into ``user_data/strategies``, and add the
location of the forecasts to freqtrade's configuration::

    "kronos": {"bootstrap": "localhost:9092", "venue": "binance"}

``venue`` is optional if its name equals that of the exchange. The daemon must forecast the same
pairs in the same timeframe. Only for dry and live runs: a backtest has no forecasts, so it makes no
trades. This is an example; its profitability has not been tested.
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
    """Enter long if a valid, undegraded forecast makes a rise likely.

    Without a valid forecast there is no exit signal either; the stop loss protects open trades.
    """

    INTERFACE_VERSION = 3
    timeframe = "5m"
    can_short = False
    stoploss = -0.03
    minimal_roi: ClassVar[dict[str, float]] = {}
    # A forecast arrives shortly after its bar, so the newest bar is processed more than once.
    process_only_new_candles = False

    enter_above = 0.6
    exit_below = 0.45

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        options = config.get("kronos", {})
        self._bootstrap = options.get("bootstrap", "localhost:9092")
        self._venue = options.get("venue", config["exchange"]["name"])
        self._latest: dict[str, Forecast] = {}
        self._reading: Future[None] | None = None

    def bot_start(self, **_: object) -> None:
        """Start to read forecasts in a separate thread."""
        if self.dp.runmode in TRADE_MODES:
            loop = asyncio.new_event_loop()
            Thread(target=loop.run_forever, name="kronos-forecasts", daemon=True).start()
            self._reading = asyncio.run_coroutine_threadsafe(self._read(), loop)

    def ft_bot_cleanup(self) -> None:
        """Stop reading; a reload of the configuration creates a new strategy."""
        super().ft_bot_cleanup()
        if self._reading is not None:
            self._reading.cancel()

    def populate_indicators(
        self, dataframe: pd.DataFrame, metadata: dict[str, Any]
    ) -> pd.DataFrame:
        """Add column ``p_up``: probability of a rise after the forecast's origin bar, else NaN.

        Therefore only a forecast from the newest bar causes a signal.
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
        """Enter if the probability of a rise is high."""
        dataframe.loc[dataframe["p_up"] > self.enter_above, "enter_long"] = 1
        return dataframe

    def populate_exit_trend(
        self, dataframe: pd.DataFrame, metadata: dict[str, Any]
    ) -> pd.DataFrame:
        """Exit if the probability of a rise is low."""
        dataframe.loc[dataframe["p_up"] < self.exit_below, "exit_long"] = 1
        return dataframe

    def confirm_trade_entry(self, pair: str, current_time: datetime, **_: object) -> bool:
        """Return whether the forecast is still valid when the order is placed."""
        return self._fresh(pair, current_time) is not None

    def _fresh(self, pair: str, now: datetime) -> Forecast | None:
        forecast = self._latest.get(f"{self._venue}:{pair}:{self.timeframe}")
        if forecast is None or forecast.degraded or forecast.valid_until <= now:
            return None
        return forecast

    async def _read(self) -> None:
        """Keep the latest forecast of each series until cancelled."""
        # Forecasts of the last bars may still be valid.
        lookback = timedelta(seconds=2 * timeframe_to_seconds(self.timeframe))
        try:
            while True:
                stream = forecasts(self._bootstrap, start=datetime.now(UTC) - lookback)
                try:
                    async with aclosing(stream):
                        async for forecast in stream:
                            self._latest[forecast.series] = forecast
                except Exception:
                    logger.exception("cannot read forecasts; retrying in %g s", RETRY_SECONDS)
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            asyncio.get_running_loop().stop()
