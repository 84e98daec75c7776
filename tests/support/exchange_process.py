"""The simulated exchange as a process. All calls block; from a coroutine use a thread."""

from __future__ import annotations

import json
import subprocess

from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from tests.support.managed_process import Closeable
from tests.support.processes import COMMAND, ProcessFailed, http_get_json

_STOP_SECONDS = 30.0
_MAX_KLINES = 1_000


class ExchangeProcess(Closeable):
    """``kronos-stream exchange``, from construction to :meth:`close`."""

    def __init__(self, *arguments: str) -> None:
        """arguments: of the command, such as ``"--symbols", "5"``. Raises ProcessFailed."""
        self._process = subprocess.Popen(
            [*COMMAND, "exchange", "--json", "--with-parent", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ProcessFailed("the exchange did not start; see stderr")
        facts = json.loads(line)
        self.rest_url, self.ws_url = str(facts["rest"]), str(facts["ws"])
        self.symbols: list[str] = facts["symbols"]
        """Its spot markets and perpetuals, in ccxt's notation."""
        self.timeframes: list[str] = facts["timeframes"]

    def settings(self) -> dict[str, str]:
        """Settings of a daemon that subscribes to all its markets and timeframes."""
        return {
            "SYMBOLS": ",".join(f"binance:{symbol}" for symbol in self.symbols),
            "TIMEFRAMES": ",".join(self.timeframes),
            "BINANCE__REST_URL": self.rest_url,
            "BINANCE__WS_URL": self.ws_url,
            "BINANCE__FUTURES_REST_URL": self.rest_url,
            "BINANCE__FUTURES_WS_URL": f"{self.ws_url}/market",
        }

    def series(self) -> list[Series]:
        """Series of all markets and timeframes."""
        timeframes = [Timeframe.parse(text) for text in self.timeframes]
        return [Series.of("binance", name, one) for name in self.symbols for one in timeframes]

    def closed_bar_times(self, series: Series, first: int, last: int) -> list[int]:
        """Open times (UTC ms) of closed bars from ``first`` to ``last``, read from its REST API."""
        futures = ":" in series.symbol
        path = "fapi/v1/klines" if futures else "api/v3/klines"
        symbol = series.symbol.partition(":")[0].replace("/", "")
        opens: list[int] = []
        while first <= last:
            rows = http_get_json(
                f"{self.rest_url}/{path}?symbol={symbol}&interval={series.timeframe}"
                f"&startTime={first}&endTime={last}&limit={_MAX_KLINES}"
            )
            now = http_get_json(f"{self.rest_url}/{path.rpartition('/')[0]}/time")["serverTime"]
            opens += [row[0] for row in rows if row[6] < now]
            if len(rows) < _MAX_KLINES:
                break
            first = rows[-1][0] + 1
        return opens

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
