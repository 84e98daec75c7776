"""A daemon under systemd's notification protocol, with a fake systemd."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.fake_systemd import FakeSystemd
from tests.support.processes import wait_for

if sys.platform != "linux":
    pytest.skip("not tested: systemd runs on Linux only", allow_module_level=True)

WATCHDOG_SECONDS = 2.0
SETTINGS = {"MODEL": "nano", "LOOKBACK": "96", "HORIZON": "8", "PATHS": "20"}

# A sink of a user, with faults that a file names: it hangs or fails, or the disk hangs. Time-outs
# of the stall checks are shortened.
SINK = """
import asyncio, time
from pathlib import Path
from pydantic import BaseModel
from kronos_stream.daemon.delivery import sink_queue
from kronos_stream.daemon.roles import stall_checks
from kronos_stream.daemon.storage.database import Database
from kronos_stream.interfaces.sink import SinkConnector, SinkUnavailable

stall_checks.DELIVER_TIMEOUT_SECONDS = stall_checks._MARGIN_SECONDS = 2.0
sink_queue._MAX_RETRY_SECONDS = 1.0
stall_checks._SAVE_SECONDS = stall_checks._TIMER_SECONDS = 4.0

class Options(BaseModel):
    fault_file: Path

class Frail:
    name = "frail"

    def __init__(self, options):
        self._fault_file, write = options.fault_file, Database.write

        async def wait_and_write(database, work):
            if self._fault_file.read_text() == "disk":
                await asyncio.sleep(600)
            return await write(database, work)

        Database.write = wait_and_write

    async def start(self):
        pass

    async def deliver(self, records):
        fault = self._fault_file.read_text()
        if fault == "block":
            time.sleep(600)
        while fault == "hang":
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass
        if fault == "away":
            raise SinkUnavailable("the broker is away")
        return ()

    async def close(self):
        pass

CONNECTOR = SinkConnector(Options, lambda options, clock, random: Frail(options))
"""


@pytest.fixture(params=["path"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeSystemd]:
    name = f"@{uuid4()}" if request.param == "abstract" else str(tmp_path / "notify")
    with FakeSystemd(name) as systemd:
        yield systemd


@pytest.fixture(scope="module")
def exchange() -> Iterator[ExchangeProcess]:
    """Exchange with two markets and one-second bars, for all tests that do not stop it."""
    with ExchangeProcess("--symbols", "2", "--history", "300") as exchange:
        yield exchange


@pytest.fixture
def make_managed_daemon(
    systemd: FakeSystemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DaemonProcess]:
    """Factory of daemons with the environment that systemd sets; not started yet."""
    info = tmp_path / "frail_sink-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: frail-sink\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kronos_stream.sinks]\nfrail = frail_sink:CONNECTOR\n")
    (tmp_path / "frail_sink.py").write_text(SINK)
    (tmp_path / "fault").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")  # as in the unit
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", str(round(1e6 * WATCHDOG_SECONDS)))

    def make(exchange: ExchangeProcess, **settings: str) -> DaemonProcess:
        sink = {"SINKS": "frail", "FRAIL__FAULT_FILE": str(tmp_path / "fault")}
        return DaemonProcess(tmp_path, SETTINGS | sink | exchange.settings() | settings)

    return make


def test_notifications_from_start_to_stop(
    systemd: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    exchange: ExchangeProcess,
) -> None:
    with make_managed_daemon(exchange) as daemon:
        daemon.start()
        first = systemd.wait_for("READY", "1")
        assert first.assignments["STATUS"].startswith("starting; ")
        assert first == systemd.notifications[0]
        assert daemon.readiness()[0] != 200  # the model is not loaded yet
        daemon.wait_until_ready()
        systemd.wait_for("STATUS", "following 2 series")
        worker = daemon.worker_pid()
        assert worker is not None
        environ = Path(f"/proc/{worker}/environ").read_bytes()
        assert b"KRONOS_TESTING_MARK" in environ
        assert b"NOTIFY_SOCKET" not in environ
        assert b"WATCHDOG" not in environ

        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        daemon.signal(signal.SIGHUP)
        reloading = systemd.wait_for("RELOADING", "1")
        assert int(reloading.assignments["MONOTONIC_USEC"]) > before
        reloaded = systemd.wait_for("READY", "1", after=1)
        assert systemd.notifications.index(reloaded) > systemd.notifications.index(reloading)

        systemd.wait_for_pings(6)

        assert daemon.stop() == 0
        last = systemd.wait_for("STOPPING", "1")
        assert int(last.assignments["EXTEND_TIMEOUT_USEC"]) > 20e6  # the grace
        assert all(
            notification.assignments == {"WATCHDOG": "1"}
            for notification in systemd.notifications[systemd.notifications.index(last) + 1 :]
        )
        assert daemon.leftover_processes() == []


@pytest.mark.parametrize("systemd", ["abstract"], indirect=True)
def test_ready_is_sent_although_the_exchange_is_unreachable(
    systemd: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    exchange: ExchangeProcess,
) -> None:
    with socket.socket() as bound:  # but not listening
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        settings = {"BINANCE__REST_URL": f"http://{address}", "BINANCE__WS_URL": f"ws://{address}"}
        with make_managed_daemon(exchange, **settings) as daemon:
            daemon.start()
            systemd.wait_for("READY", "1")
            systemd.wait_for_pings(4)
            assert systemd.matching("STATUS")[-1].assignments["STATUS"].startswith("starting")
            assert daemon.stop() == 0


def test_unreachable_services_and_a_lost_worker_are_no_stall(
    systemd: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    tmp_path: Path,
) -> None:
    with (
        ExchangeProcess("--symbols", "2", "--history", "300") as exchange,
        make_managed_daemon(exchange) as daemon,
    ):
        daemon.start()
        daemon.wait_until_ready()
        _wait_for_forecasts(daemon)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        wait_for("a new worker", lambda: daemon.worker_pid() not in (worker, None))
        _wait_for_forecasts(daemon)
        (tmp_path / "fault").write_text("away")
        problem = "sink frail: the broker is away"
        status = systemd.wait_for("STATUS", "not ready; ", part=problem).assignments["STATUS"]
        assert " records undelivered; " in status
        exchange.close()
        # Longer than all time-outs of stall checks.
        systemd.wait_for_pings(round(2 * 7.0 / WATCHDOG_SECONDS))
        assert daemon.readiness()[1]["sink frail"] == "the broker is away"
        assert not any(line["event"].startswith("stalled") for line in daemon.log_records())
        systemd.wait_for_pings(1)


STALLS = {
    "block": "",  # blocks the event loop, so nothing can be reported
    "hang": "delivering to frail",
    "disk": "saving closed bars",
}


@pytest.mark.parametrize("fault", STALLS)
def test_stalled_daemon_sends_no_pings(
    fault: str,
    systemd: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    exchange: ExchangeProcess,
    tmp_path: Path,
) -> None:
    with make_managed_daemon(exchange) as daemon:
        daemon.start()
        daemon.wait_until_ready()
        _wait_for_forecasts(daemon)
        systemd.wait_for_pings(1)
        (tmp_path / "fault").write_text(fault)
        wait_for("no pings", lambda: systemd.seconds_since_ping() > 2 * WATCHDOG_SECONDS)
        assert daemon.worker_pid() is not None
        if task := STALLS[fault]:
            assert systemd.wait_for("STATUS", "stalled: ", part=f"{task}: no progress for ")
            assert any(line["event"].startswith("stalled") for line in daemon.log_records())
        daemon.signal(signal.SIGABRT)  # as systemd does
        assert daemon.wait() == -signal.SIGABRT
        if fault == "block":
            assert "in deliver" in daemon.log_file.read_text("utf-8")
        wait_for("the end of the worker", lambda: not daemon.leftover_processes())


def test_status_names_the_failure(
    systemd: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    exchange: ExchangeProcess,
) -> None:
    with make_managed_daemon(exchange, MODEL="/nowhere") as daemon:
        daemon.start()
        assert daemon.wait() == 2
        assert "/nowhere" in systemd.wait_for("STATUS", "failed: ").assignments["STATUS"]
        assert systemd.matching("STOPPING", "1")


def _wait_for_forecasts(daemon: DaemonProcess) -> None:
    """Wait for more forecasts."""
    before = daemon.metric("kronos_delivered_total")
    what = f"forecasts ({daemon.log_file})"
    wait_for(what, lambda: daemon.metric("kronos_delivered_total") >= before + 4)
