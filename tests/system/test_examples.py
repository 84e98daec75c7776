"""The examples of the documentation, run as a reader would."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from threading import Thread
from threading import enumerate as enumerate_threads
from types import TracebackType
from typing import Any, Self

import pandas as pd
import pytest
from confluent_kafka import Producer

from kronos_connectors.kafka.topics import forecast_topic as topic_of
from kronos_connectors.mqtt import SINK, MqttOptions
from kronos_stream.forecast.compose import removal
from kronos_stream.interfaces.sink import Envelope, Record, RecordKind, SinkUnavailable
from kronos_stream.market.clock import SystemClock
from kronos_stream.testing.broker import EmbeddedBroker
from tests.support.mosquitto import Mosquitto
from tests.support.paths import ROOT
from tests.support.processes import WAIT_SECONDS, wait_for

EXAMPLES = ROOT / "docs" / "examples"
TOPIC = topic_of("kronos")

ForecastOf = Callable[..., Envelope]


class ExampleProcess:
    """An example as a process, and its output."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        streams = ((self._process.stdout, self.lines), (self._process.stderr, self._errors))
        self._threads = [Thread(target=self._collect, args=pair) for pair in streams]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _collect(stream: Iterable[str], lines: list[str]) -> None:
        lines.extend(line.rstrip("\n") for line in stream)  # line by line, as they are printed

    def wait_for(self, number: int) -> None:
        """Wait until it has printed so many lines."""

        def there() -> bool:
            assert self._process.poll() is None, self._errors
            return len(self.lines) >= number

        wait_for(f"{number} lines from it, after {self.lines} {self._errors}", there)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()


def _publish(bootstrap: str, *forecasts: Envelope) -> None:
    """Publish forecasts in order."""
    producer = Producer({"bootstrap.servers": bootstrap})
    for one in forecasts:
        producer.produce(TOPIC, one.value, one.key, partition=0, headers=list(one.headers))
    assert producer.flush(WAIT_SECONDS) == 0


def test_bot_acts_on_valid_current_forecasts_only(make_forecast: ForecastOf) -> None:
    source = (EXAMPLES / "bot.py").read_text("utf-8").splitlines()
    assert len([line for line in source if line.strip()]) <= 15
    with (
        EmbeddedBroker([TOPIC]) as broker,
        ExampleProcess("bot.py", broker.bootstrap, "BTC/USDT") as bot,
    ):

        def acted() -> bool:
            _publish(
                broker.bootstrap,
                make_forecast("expired:BTC/USDT:1h", ago=5),
                make_forecast("degraded:BTC/USDT:1h", reasons=["bars are missing"]),
                make_forecast("other:ETH/USDT:1h"),
                make_forecast("rising:BTC/USDT:1h", p_up=0.7),
                make_forecast("falling:BTC/USDT:1h", p_up=0.3),
                make_forecast("neither:BTC/USDT:1h", p_up=0.5),
            )
            time.sleep(0.2)
            return len(bot.lines) >= 3

        wait_for("the bot acts", acted)
        actions = [line.split() for line in bot.lines]
    assert {(series, action) for series, _, _, action in actions} == {
        ("rising:BTC/USDT:1h", "buy"),
        ("falling:BTC/USDT:1h", "sell"),
        ("neither:BTC/USDT:1h", "hold"),
    }


async def test_subscriber_shows_the_latest_forecasts(
    make_mosquitto: Callable[..., Mosquitto], make_forecast: ForecastOf
) -> None:
    btc, eth = "binance:BTC/USDT:1h", "binance:ETH/USDT:1h"
    with make_mosquitto() as broker:
        sink = SINK.build(MqttOptions(url=broker.url), SystemClock(), Random(0))

        async def send(*messages: Envelope, kind: RecordKind = "forecast") -> None:
            records = [Record(0, kind, one.key, one.value, one.headers, 0) for one in messages]
            async with asyncio.timeout(WAIT_SECONDS):
                while True:
                    try:
                        assert not await sink.deliver(records)
                    except SinkUnavailable:  # the sink has not reconnected yet
                        await asyncio.sleep(0.1)
                    else:
                        return

        await sink.start()
        await send(make_forecast(btc, ago=3), make_forecast(eth, p_up=0.3))
        with ExampleProcess("mqtt_subscriber.py", "127.0.0.1", str(broker.port)) as subscriber:

            async def shown(number: int) -> list[str]:
                """New lines, as soon as there are so many."""
                await asyncio.to_thread(subscriber.wait_for, number)
                lines, subscriber.lines[:] = [*subscriber.lines], []
                return lines

            retained = sorted(await shown(2))
            assert [line.partition(" ")[0] for line in retained] == [btc, eth]
            assert retained[0].endswith("up 70%, last close of 3 is 103.5 on average (expired)")
            assert retained[1].endswith("up 30%, last close of 3 is 101.5 on average")
            new = make_forecast(btc)
            doubtful = make_forecast(btc, p_up=0.5, revision=1, reasons=["a bar is missing"])
            await send(new, new, doubtful, new, doubtful, make_forecast(eth, revision=1))
            fresh, revised, _ = await shown(3)  # what came again is no news
            assert "up 70%" in fresh
            assert "up 50%" in revised
            assert revised.endswith("(a bar is missing)")
            await asyncio.to_thread(broker.kill)
            await asyncio.to_thread(broker.start)
            await send(make_forecast(eth, p_up=0.4, revision=2))
            (after,) = await shown(1)  # nor is what the broker retained
            assert "up 40%" in after
            await send(removal(eth, at=0), kind="removal")
            assert await shown(1) == ["kronos/forecasts/binance/ETH%2FUSDT/1h: no forecast"]
        await sink.close()


def test_strategy_trades_by_valid_current_forecasts_only(
    make_forecast: ForecastOf, tmp_path: Path
) -> None:
    reason = "freqtrade is not installed here"
    resolvers: Any = pytest.importorskip("freqtrade.resolvers", reason=reason)
    enums: Any = pytest.importorskip("freqtrade.enums")
    provider: Any = pytest.importorskip("freqtrade.data.dataprovider")
    with EmbeddedBroker([TOPIC]) as broker:
        config = {
            "strategy": "KronosForecasts",
            "strategy_path": str(EXAMPLES),
            "recursive_strategy_search": False,
            "user_data_dir": tmp_path,
            "exchange": {"name": "binance"},
            "stake_currency": "USDT",
            "stake_amount": 10,
            "max_open_trades": 1,
            "dry_run": True,
            "runmode": enums.RunMode.DRY_RUN,
            "candle_type_def": enums.CandleType.SPOT,
            "kronos": {"bootstrap": broker.bootstrap},
        }
        strategy = resolvers.StrategyResolver.load_strategy(config)
        strategy.dp = provider.DataProvider(config, None)
        strategy.ft_bot_start()

        def signals(base: str, late: int = 0) -> tuple[bool, bool]:
            """Return whether it enters and exits, with data that end ``late`` bars ago."""
            pair = f"{base}/USDT"
            frame = strategy.analyze_ticker(_candles(late), {"pair": pair})
            enter = strategy.get_entry_signal(pair, "5m", frame)[0] is not None
            return enter, bool(strategy.get_exit_signal(pair, "5m", frame)[1])

        def traded() -> bool:
            _publish(
                broker.bootstrap,
                make_forecast("binance:OLD/USDT:5m", ago=5),
                make_forecast("binance:BAD/USDT:5m", reasons=["bars are missing"]),
                make_forecast("kraken:OFF/USDT:5m"),
                make_forecast("binance:OFF/USDT:1m"),
                make_forecast("binance:EVEN/USDT:5m", p_up=0.5),
                make_forecast("binance:UP/USDT:5m", p_up=0.7),
                make_forecast("binance:DOWN/USDT:5m", p_up=0.3),
            )
            time.sleep(0.2)
            return signals("UP") == (True, False) and signals("DOWN") == (False, True)

        try:
            wait_for("the strategy trades", traded)
            for base in ("OLD", "BAD", "OFF", "EVEN", "NONE"):
                assert signals(base) == (False, False), base
            assert signals("UP", late=1) == (False, False)  # the forecast is of another bar
            soon, late = datetime.now(UTC), datetime.now(UTC) + timedelta(minutes=10)
            assert strategy.confirm_trade_entry(pair="UP/USDT", current_time=soon, side="long")
            assert not strategy.confirm_trade_entry(pair="UP/USDT", current_time=late, side="long")
        finally:
            strategy.ft_bot_cleanup()
    wait_for("its thread ends", lambda: "kronos-forecasts" not in _threads())


def _candles(late: int) -> pd.DataFrame:
    """Forty bars in the form of freqtrade, the newest of which closed ``late`` bars ago."""
    end = pd.Timestamp.now("UTC").floor("5min") - pd.Timedelta(minutes=5 * (1 + late))
    prices = dict.fromkeys(("open", "high", "low", "close", "volume"), 100.0)
    return pd.DataFrame({"date": pd.date_range(end=end, periods=40, freq="5min"), **prices})


def _threads() -> list[str]:
    return [thread.name for thread in enumerate_threads()]


QUERIES = re.findall(
    r"^```promql\n(.*?)^```", (EXAMPLES / "grafana.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)


def test_prometheus_accepts_the_queries(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("not tested with Prometheus: no promtool on PATH")
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(QUERIES)]
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}), "utf-8")
    checked = subprocess.run(
        ["promtool", "check", "rules", str(path)],  # noqa: S607
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert f"{len(QUERIES)} rules found" in checked.stdout
