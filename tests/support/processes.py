"""The simulated exchange as a process, and what else it takes to test with processes.

All calls block; from a coroutine use a thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import orjson

from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from tests.support.managed_process import Closeable

# -P: what lies in the folder we were started in is no module of ours.
COMMAND = (sys.executable, "-P", "-m", "kronos_stream")
_STOP_TIMEOUT = 10.0
_HTTP_TIMEOUT = 5.0
_POLL_SECONDS = 0.05
_MAX_KLINES = 1_000


class ProcessFailed(Exception):  # noqa: N818
    """A process did not do in time what it should; says where its log is."""


def wait_for(
    description: str,
    condition: Callable[[], object],
    timeout: float,
    interval: float = _POLL_SECONDS,
) -> None:
    """Return once ``happened()`` is true. Raises ProcessFailed, naming ``what``, after that."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise ProcessFailed(f"not within {timeout:g} s: {description}")
        time.sleep(interval)


def http_get(url: str) -> tuple[int, bytes]:
    """Status and body of an answer; 0 where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def http_get_json(url: str) -> Any:
    """What is answered. Raises ProcessFailed where that is an error."""
    status, body = http_get(url)
    if status != 200:
        raise ProcessFailed(f"{url} answers {status}: {body.decode(errors='replace')}")
    return orjson.loads(body)


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
            raise ProcessFailed("the exchange did not start; it has said why on stderr")
        facts = json.loads(line)
        self.rest_url, self.ws_url = str(facts["rest"]), str(facts["ws"])
        self.symbols: list[str] = facts["symbols"]
        """Its spot markets and perpetuals, in ccxt's notation."""
        self.timeframes: list[str] = facts["timeframes"]

    def settings(self) -> dict[str, str]:
        """Variables that make a daemon follow every market and timeframe of it."""
        return {
            "SYMBOLS": ",".join(f"binance:{symbol}" for symbol in self.symbols),
            "TIMEFRAMES": ",".join(self.timeframes),
            "BINANCE__REST_URL": self.rest_url,
            "BINANCE__WS_URL": self.ws_url,
            "BINANCE__FUTURES_REST_URL": self.rest_url,
            "BINANCE__FUTURES_WS_URL": f"{self.ws_url}/market",
        }

    def series(self) -> list[Series]:
        """All that can be followed."""
        lengths = [Timeframe.parse(text) for text in self.timeframes]
        return [Series.of("binance", name, length) for name in self.symbols for length in lengths]

    def closed_bar_times(self, series: Series, first: int, last: int) -> list[int]:
        """Opens, UTC ms, of the closed bars with first <= open <= last, as REST tells them."""
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
        """End it."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
