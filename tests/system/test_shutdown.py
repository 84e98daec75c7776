"""Start and stop of the daemon: invalid settings, SIGTERM, SIGHUP, a lost worker."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from kronos_stream.forecast.message import Forecast, Removal
from tests.support.apache_kafka import ApacheKafka
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.forecast_audit import audit_forecasts, is_removal, read_topic
from tests.support.processes import settings_environment, wait_for

GOOD = {
    "SYMBOLS": "binance:SIM00/USDT",
    "TIMEFRAMES": "1s",
    "SINKS": "jsonl",
    "MODEL": "nano",
    "LOOKBACK": "96",
    "HORIZON": "8",
}


@pytest.fixture(scope="module")
def exchange() -> Iterator[ExchangeProcess]:
    """Four markets, one-second bars."""
    with ExchangeProcess("--symbols", "4", "--history", "300") as exchange:
        yield exchange


def _run(
    exchange: ExchangeProcess, folder: Path, settings: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    given = {"STATE_FILE": str(folder / "state"), "HTTP__PORT": "0", "LOG__LEVEL": "error"}
    given |= {"JSONL__PATH": str(folder / "forecasts.jsonl")}
    given |= exchange.settings() | GOOD | settings
    return subprocess.run(
        [sys.executable, "-m", "kronos_stream", "run", *arguments],
        env=settings_environment(given),
        capture_output=True,
        text=True,
        check=False,
    )


def test_check_prints_the_series_and_the_model(exchange: ExchangeProcess, tmp_path: Path) -> None:
    ended = _run(exchange, tmp_path, {}, "--check")
    assert ended.returncode == 0, ended.stderr
    assert "has all 1 series" in ended.stdout
    assert "\nok    model: nano on " in ended.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=["run", "check"])
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"SYMBOLS": ""}, "KRONOS_STREAM_SYMBOLS_FILE name no symbols"),
        ({"HORIZON": "0"}, "KRONOS_STREAM_HORIZON=0: "),
        ({"LOKBACK": "96"}, "did you mean KRONOS_STREAM_LOOKBACK?"),
        ({"SINKS": "kafka"}, "KRONOS_STREAM_KAFKA__BOOTSTRAP_SERVERS is required"),
        ({"MODEL": "/nowhere"}, "/nowhere"),
        ({"LOOKBACK": "250"}, "set KRONOS_STREAM_LOOKBACK to at most 248"),
        ({"SYMBOLS": "binance:NONE/USDT"}, "binance:NONE/USDT:1s: "),
    ],
)
def test_invalid_setting_gives_a_one_line_error(
    settings: dict[str, str],
    complaint: str,
    arguments: tuple[str, ...],
    exchange: ExchangeProcess,
    tmp_path: Path,
) -> None:
    ended = _run(exchange, tmp_path, settings, *arguments)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert complaint in ended.stderr


def test_unusable_state_file_gives_one_line(exchange: ExchangeProcess, tmp_path: Path) -> None:
    ended = _run(exchange, tmp_path, {"STATE_FILE": "/proc/state.sqlite"})
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "STATE_FILE must be in a writable folder" in ended.stderr


def test_sigterm_delivers_all_forecasts_and_leaves_no_process(
    exchange: ExchangeProcess,
    kafka: ApacheKafka,
    topic_prefix: str,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    with make_daemon(exchange, kafka.bootstrap) as daemon:
        daemon.start()
        daemon.wait_until_ready()
        wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= 8)
        assert daemon.stop() == 0
        assert daemon.leftover_processes() == []
        assert daemon.undelivered() == 0
        newest = {
            series.name: end for series, (_, end) in daemon.outcome_range(exchange.series()).items()
        }
    records = read_topic(kafka.bootstrap, f"{topic_prefix}.forecasts.v1")
    found = audit_forecasts(records, {})
    assert found.problems == []
    assert found.duplicates == 0
    origins = [(one.series, one.origin) for one in map(Forecast.parse, dict(records).values())]
    # The last forecast on the topic is that of the newest bar with an outcome.
    assert {name: round(1000 * origin.timestamp()) for name, origin in origins} == newest


def test_second_sigterm_ends_the_daemon_at_once(
    exchange: ExchangeProcess,
    kafka: ApacheKafka,
    topic_prefix: str,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    with make_daemon(exchange, kafka.bootstrap, CATCH_UP="all", BATCH_DEADLINE="600") as daemon:
        daemon.start()
        daemon.wait_until_ready()
        wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= 4)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)  # its batch never ends
        due = partial(daemon.metric, "kronos_queue_depth", queue="due")
        wait_for("bars wait for the worker", lambda: due() > 0)
        daemon.signal(signal.SIGTERM)
        wait_for("it stops", lambda: _has_logged(daemon, "stopping; a second signal ends at once"))
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 128 + signal.SIGTERM
        wait_for("its worker has ended", lambda: not daemon.leftover_processes())
        with closing(sqlite3.connect(daemon.state_file)) as state:
            assert state.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

        daemon.start()  # nothing was lost
        daemon.wait_until_ready()
        wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= 16)
        assert daemon.stop() == 0
        _assert_every_bar_is_forecast(daemon, exchange, kafka, topic_prefix)


def test_sighup_reloads_the_symbols_file(
    exchange: ExchangeProcess,
    kafka: ApacheKafka,
    topic_prefix: str,
    tmp_path: Path,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    listed = tmp_path / "symbols"
    listed.write_text("binance:SIM00/USDT\nbinance:SIM01/USDT\n", "utf-8")
    reloaded = {"SYMBOLS": "", "SYMBOLS_FILE": str(listed), "CATCH_UP": "all"}
    with make_daemon(exchange, kafka.bootstrap, **reloaded) as daemon:
        daemon.start()
        daemon.wait_until_ready()
        wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= 4)

        listed.write_text("binance:SIM00/USDT\nbinance:NONE/USDT\n", "utf-8")
        daemon.signal(signal.SIGHUP)
        wait_for("the reload is refused", lambda: _has_logged(daemon, "symbols not changed"))

        listed.write_text("binance:SIM00/USDT\nbinance:SIM02/USDT\n", "utf-8")
        daemon.signal(signal.SIGHUP)
        wait_for("the series change", lambda: _has_logged(daemon, "series changed"))
        changed = time.time()
        forecast = _forecast_since(kafka, topic_prefix, changed)
        wait_for("the new one's forecast", lambda: _ADDED in forecast(), interval=0.5)
        assert daemon.stop() == 0
        assert forecast() == {_KEPT, _ADDED}
        _assert_removed(kafka, topic_prefix, _REMOVED)
        _assert_every_bar_is_forecast(daemon, exchange, kafka, topic_prefix)


_KEPT, _ADDED, _REMOVED = (f"binance:SIM0{i}/USDT:1s" for i in (0, 2, 1))


def _assert_removed(kafka: ApacheKafka, topic_prefix: str, series: str) -> None:
    """Check that a series ends with its removal, and has no latest forecast."""
    values = [
        [
            value
            for key, value in read_topic(kafka.bootstrap, f"{topic_prefix}.{topic}")
            if key == series
        ]
        for topic in ("forecasts.v1", "forecasts.latest.v1")
    ]
    assert Removal.parse(values[0][-1]).series == series
    assert values[1][-1] == b""
    assert all(len(some) > 1 for some in values)


@pytest.mark.parametrize("lost_by", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_worker_is_replaced(
    lost_by: signal.Signals,
    exchange: ExchangeProcess,
    kafka: ApacheKafka,
    topic_prefix: str,
    make_daemon: Callable[..., DaemonProcess],
) -> None:
    with make_daemon(exchange, kafka.bootstrap, CATCH_UP="all", BATCH_DEADLINE="10") as daemon:
        daemon.start()
        daemon.wait_until_ready()
        wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= 8)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, lost_by)
        wait_for("the loss is noticed", lambda: daemon.metric("kronos_worker_restarts_total") >= 1)
        wait_for("another worker runs", lambda: daemon.worker_pid() not in (worker, None))
        delivered = daemon.metric("kronos_delivered_total")
        wait_for("forecasts", lambda: daemon.metric("kronos_delivered_total") >= delivered + 16)
        assert daemon.readiness()[0] == 200
        assert daemon.stop() == 0
        _assert_every_bar_is_forecast(daemon, exchange, kafka, topic_prefix)
        assert daemon.leftover_processes() == []


def _assert_every_bar_is_forecast(
    daemon: DaemonProcess, exchange: ExchangeProcess, kafka: ApacheKafka, prefix: str
) -> None:
    """Check that all bars of the exchange that were due are forecast, in order."""
    decided = daemon.outcome_range(exchange.series())
    due = {series: exchange.closed_bar_times(series, *span) for series, span in decided.items()}
    found = audit_forecasts(read_topic(kafka.bootstrap, f"{prefix}.forecasts.v1"), due)
    assert found.problems == []
    assert sum(map(len, due.values())) > 0


def _has_logged(daemon: DaemonProcess, event: str) -> bool:
    return any(line["event"] == event for line in daemon.log_records())


def _forecast_since(kafka: ApacheKafka, prefix: str, since: float) -> Callable[[], set[str]]:
    """Series with forecasts of bars that closed after ``since``, Unix seconds."""

    def names() -> set[str]:
        values = read_topic(kafka.bootstrap, f"{prefix}.forecasts.v1")
        made = (Forecast.parse(value) for _, value in values if not is_removal(value))
        return {one.series for one in made if one.times[0].timestamp() > since + 1}

    return names
