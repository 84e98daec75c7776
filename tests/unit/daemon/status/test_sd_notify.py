"""Notifications to the service manager, and the status reports made of them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.status.sd_notify import _MAX_PENDING, Notifier
from kronos_stream.daemon.status.systemd import StatusReporter
from kronos_stream.daemon.status.watchdog import StallCheck, Watchdog
from kronos_stream.daemon.telemetry.metrics import Metrics
from tests.support.fake_systemd import FakeSystemd

if sys.platform != "linux":
    pytest.skip("not tested: systemd runs on Linux only", allow_module_level=True)


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeSystemd]:
    name = f"@{uuid4()}" if request.param == "abstract" else str(tmp_path / "notify")
    with FakeSystemd(name) as systemd:
        yield systemd


def test_notifier_without_a_service_manager_does_nothing() -> None:
    environ = {"PATH": "/bin", "WATCHDOG_USEC": "1000000"}
    with capture_logs() as logs:
        notifier = Notifier.from_environ(environ)
        notifier.notify(READY=1)
        notifier.close()
    assert not notifier.enabled
    assert notifier.watchdog_seconds == 0
    assert environ == {"PATH": "/bin"}
    assert logs == []


@pytest.mark.parametrize(("pid", "seconds"), [("", 20.0), ("ours", 20.0), ("1", 0.0), ("x", 0.0)])
def test_watchdog_of_another_process_is_ignored(
    pid: str, seconds: float, systemd: FakeSystemd
) -> None:
    environ = {
        "WATCHDOG_USEC": "20000000",
        "WATCHDOG_PID": str(os.getpid()) if pid == "ours" else pid,
        "NOTIFY_SOCKET": systemd.address,
    }
    notifier = Notifier.from_environ(environ)
    assert notifier.enabled
    assert notifier.watchdog_seconds == seconds
    assert environ == {}
    notifier.close()


@pytest.mark.parametrize("address", ["/nowhere/notify", "vsock:2:4711"])
def test_unusable_socket_is_a_warning(address: str) -> None:
    with capture_logs() as logs:
        notifier = Notifier.from_environ({"NOTIFY_SOCKET": address})
        notifier.notify(READY=1)
    assert [line["log_level"] for line in logs] == ["warning"]
    notifier.close()


def test_values_are_single_lines(systemd: FakeSystemd) -> None:
    notifier = Notifier(systemd.address)
    notifier.notify(READY=1, STATUS="two\nlines, one of them\nSTOPPING=1 " + chr(0xDC80))
    received = systemd.wait_for("READY", "1").assignments
    assert received["STATUS"] == "two lines, one of them STOPPING=1 ?"
    assert not systemd.matching("STOPPING")
    notifier.close()


def test_messages_to_a_busy_manager_are_sent_later_in_order(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)  # noqa: FBT003
        notifier = Notifier(str(tmp_path / "notify"))
        count = _MAX_PENDING + int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text("ascii"))
        for number in range(count):  # nothing is read meanwhile
            notifier.notify(X_NUMBER=number)
        received: list[bytes] = []
        while b"X_NUMBER=last" not in received:
            try:
                received.append(receiver.recv(100))
            except BlockingIOError:
                notifier.notify(X_NUMBER="last")
        assert received[:count] == [f"X_NUMBER={number}".encode() for number in range(count)]
        notifier.close()


class _Daemon:
    """A daemon whose exchange cannot be reached."""

    series_count = 3

    def __init__(self, role: str) -> None:
        self.settings = Settings(role=role)  # type: ignore[arg-type]
        self.metrics = Metrics()
        self.running, self.ready = asyncio.Event(), asyncio.Event()
        self.watchdog = Watchdog()

    def readiness(self) -> dict[str, str]:
        return {"sink kafka": "", "source binance": "away: https://me:secret@host\nis not"}


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("role", "rate"), [("forecast", "7 forecasts in the last minute"), ("ingest", "9 bars in the")]
)
async def test_status_has_problems_and_rate(role: str, rate: str, systemd: FakeSystemd) -> None:
    daemon = _Daemon(role)
    notifier = Notifier(systemd.address)
    reporting = asyncio.create_task(StatusReporter(daemon, notifier).run())
    daemon.running.set()
    daemon.ready.set()
    await asyncio.sleep(1.0)
    daemon.metrics.outcomes.labels("forecast", "").inc(7)
    daemon.metrics.outcomes.labels("skipped", "gap").inc(5)
    daemon.metrics.bars.labels("binance", "1m").inc(9)
    await asyncio.sleep(70.0)
    reporting.cancel()
    notifier.close()
    systemd.wait_for("STATUS", "not ready; following 3 series; source binance: away: ")
    status = systemd.wait_for("STATUS", f"not ready; following 3 series; {rate}").assignments
    assert status["STATUS"].endswith("source binance: away: https://me:***@host is not")
    assert len(systemd.matching("STATUS")) == 2  # only changes are sent


@pytest.mark.virtual_time
async def test_stalled_daemon_sends_no_pings(systemd: FakeSystemd) -> None:
    daemon = _Daemon("all")
    stalled = StallCheck("saving", lambda: True, lambda: None, lambda: 5.0)
    daemon.watchdog.set_checks([stalled])
    daemon.watchdog.stalled()
    stalled._last_change = -1e9
    notifier = Notifier(systemd.address, watchdog_seconds=2.0)
    with capture_logs() as logs:
        reporting = asyncio.create_task(StatusReporter(daemon, notifier).run())
        daemon.running.set()
        await asyncio.sleep(20.0)
        reporting.cancel()
        notifier.close()
    systemd.wait_for("STATUS", "stalled: saving: no progress for ")
    assert not systemd.matching("WATCHDOG")
    (record,) = (line for line in logs if line["log_level"] == "error")
    assert record["event"] == "stalled; no more pings to the watchdog"
    assert record["tasks"].startswith("saving: no progress for ")
