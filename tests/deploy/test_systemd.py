"""What systemd hears of the daemon, over a real socket, and that the unit is one it takes."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple, Self
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.reference import describe_settings
from kronos_stream.daemon.config.settings import Settings
from kronos_stream.daemon.status.sd_notify import _MAX_PENDING, Notifier
from kronos_stream.daemon.status.systemd import StatusReporter
from kronos_stream.daemon.status.watchdog import StallCheck, Watchdog
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.testing.virtual_time import run_virtual
from tests.support.daemon_process import DaemonProcess
from tests.support.exchange_process import ExchangeProcess
from tests.support.paths import ROOT
from tests.support.processes import wait_for

if sys.platform != "linux":
    pytest.skip("not tested: systemd is Linux's", allow_module_level=True)

WATCHDOG_SECONDS = 2.0
GIVEN = {"MODEL": "nano", "LOOKBACK": "96", "HORIZON": "8", "PATHS": "20"}

# A sink as a user may write one, that does what stands in a file; and a disk that may hang. The
# daemon's patience with its own tasks is cut short.
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
    orders: Path

class Frail:
    name = "frail"

    def __init__(self, options):
        self._orders, write = options.orders, Database.write

        async def wait_and_write(database, work):
            if self._orders.read_text() == "disk":
                await asyncio.sleep(600)
            return await write(database, work)

        Database.write = wait_and_write

    async def start(self):
        pass

    async def deliver(self, records):
        order = self._orders.read_text()
        if order == "block":
            time.sleep(600)
        while order == "hang":
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass
        if order == "away":
            raise SinkUnavailable("the broker is away")
        return ()

    async def close(self):
        pass

CONNECTOR = SinkConnector(Options, lambda options, clock, random: Frail(options))
"""


class Notification(NamedTuple):
    """A message."""

    time: float
    """Monotonic seconds."""
    assignments: dict[str, str]


class FakeSystemd:
    """The end of the socket that systemd holds; bound until the ``with`` block ends."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.notifications: list[Notification] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(0.1)
        self._stop = Event()
        self._listening = Thread(target=self._listen, daemon=True)

    def matching(self, name: str, begin: str = "", within: str = "") -> list[Notification]:
        """Messages in which that is assigned: what begins so, and holds that."""
        return [
            one
            for one in list(self.notifications)
            for value in one.assignments.get(name, "").splitlines()
            if value.startswith(begin) and within in value
        ]

    def wait_for(self, name: str, begin: str, *, within: str = "", after: int = 0) -> Notification:
        """The first such message but the ``after`` first."""
        what = f"{name}={begin}…{within}"
        wait_for(what, lambda: len(self.matching(name, begin, within)) > after)
        return self.matching(name, begin, within)[after]

    def seconds_since_watchdog(self) -> float:
        """Seconds since the watchdog was fed."""
        return time.monotonic() - self.matching("WATCHDOG", "1")[-1].time

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._socket.recv(65_536).decode()
            except TimeoutError:
                continue
            said = dict(line.split("=", 1) for line in message.splitlines())
            self.notifications.append(Notification(time.monotonic(), said))

    def __enter__(self) -> Self:
        self._listening.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._listening.join()
        self._socket.close()


@pytest.fixture(params=["path"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeSystemd]:
    """At a path, or an abstract name."""
    name = f"@{uuid4()}" if request.param == "abstract" else str(tmp_path / "notify")
    with FakeSystemd(name) as manager:
        yield manager


@pytest.fixture(scope="module")
def exchange() -> Iterator[ExchangeProcess]:
    """Two markets, one-second bars; nobody stops it."""
    with ExchangeProcess("--symbols", "2", "--history", "300") as exchange:
        yield exchange


@pytest.fixture
def make_managed_daemon(
    systemd: FakeSystemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DaemonProcess]:
    """Makes a daemon, not yet started, as systemd would; its sink has its orders in a file."""
    info = tmp_path / "frail_sink-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: frail-sink\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kronos_stream.sinks]\nfrail = frail_sink:CONNECTOR\n")
    (tmp_path / "frail_sink.py").write_text(SINK)
    (tmp_path / "orders").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")  # as in the unit
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", str(round(1e6 * WATCHDOG_SECONDS)))

    def make(exchange: ExchangeProcess, **settings: str) -> DaemonProcess:
        sink = {"SINKS": "frail", "FRAIL__ORDERS": str(tmp_path / "orders")}
        return DaemonProcess(tmp_path, GIVEN | sink | exchange.settings() | settings)

    return make


def test_it_is_told_from_start_to_stop(
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
        asked = systemd.wait_for("RELOADING", "1")
        assert int(asked.assignments["MONOTONIC_USEC"]) > before
        done = systemd.wait_for("READY", "1", after=1)
        assert systemd.notifications.index(done) > systemd.notifications.index(asked)

        wait_for("some more of it", lambda: len(systemd.matching("WATCHDOG", "1")) >= 6)

        assert daemon.stop() == 0
        last = systemd.wait_for("STOPPING", "1")
        assert int(last.assignments["EXTEND_TIMEOUT_USEC"]) > 20e6  # the grace
        assert all(
            one.assignments == {"WATCHDOG": "1"}
            for one in systemd.notifications[systemd.notifications.index(last) + 1 :]
        )
        assert daemon.leftover_processes() == []


@pytest.mark.parametrize("manager", ["abstract"], indirect=True)
def test_it_is_ready_though_the_exchange_is_away(
    manager: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    exchange: ExchangeProcess,
) -> None:
    with socket.socket() as nobody:  # bound, so that no one else listens there
        nobody.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{nobody.getsockname()[1]}"
        settings = {"BINANCE__REST_URL": f"http://{away}", "BINANCE__WS_URL": f"ws://{away}"}
        with make_managed_daemon(exchange, **settings) as daemon:
            daemon.start()
            manager.wait_for("READY", "1")
            wait_for("it is fed", lambda: len(manager.matching("WATCHDOG", "1")) >= 4)
            assert manager.matching("STATUS")[-1].assignments["STATUS"].startswith("starting")
            assert daemon.stop() == 0


def test_who_is_away_or_lost_is_no_lack_of_progress(
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
        _forecasts(daemon)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        wait_for("it is replaced", lambda: daemon.worker_pid() not in (worker, None))
        _forecasts(daemon)
        (tmp_path / "orders").write_text("away")
        told = systemd.wait_for("STATUS", "not ready; ", within="sink frail: the broker is away")
        assert " records undelivered; " in told.assignments["STATUS"]
        exchange.close()
        time.sleep(7.0)
        assert daemon.readiness()[1]["sink frail"] == "the broker is away"
        assert not any(line["event"].startswith("stuck") for line in daemon.log_records())
        fed = len(systemd.matching("WATCHDOG", "1"))
        wait_for("it is fed", lambda: len(systemd.matching("WATCHDOG", "1")) > fed)


STUCK = {
    "block": "",  # the event loop: nobody is left to say so
    "hang": "delivering to frail",
    "disk": "saving closed bars",
}


@pytest.mark.parametrize("fault", STUCK)
def test_a_stuck_daemon_feeds_no_watchdog(
    fault: str,
    systemd: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    exchange: ExchangeProcess,
    tmp_path: Path,
) -> None:
    with make_managed_daemon(exchange) as daemon:
        daemon.start()
        daemon.wait_until_ready()
        _forecasts(daemon)
        wait_for("it is fed", lambda: systemd.seconds_since_watchdog() < WATCHDOG_SECONDS)
        (tmp_path / "orders").write_text(fault)
        wait_for("it starves", lambda: systemd.seconds_since_watchdog() > 2 * WATCHDOG_SECONDS)
        assert daemon.worker_pid() is not None
        if what := STUCK[fault]:
            assert systemd.wait_for("STATUS", "stuck: ", within=f"{what}: no progress for ")
            assert any(line["event"].startswith("stuck") for line in daemon.log_records())
        daemon.signal(signal.SIGABRT)  # what systemd does then
        assert daemon.wait() == -signal.SIGABRT
        if fault == "block":
            assert "in deliver" in daemon.log_file.read_text("utf-8")
        wait_for("its worker has ended", lambda: not daemon.leftover_processes())


def test_a_failure_is_in_the_status(
    systemd: FakeSystemd,
    make_managed_daemon: Callable[..., DaemonProcess],
    exchange: ExchangeProcess,
) -> None:
    with make_managed_daemon(exchange, MODEL="/nowhere") as daemon:
        daemon.start()
        assert daemon.wait() == 2
        assert "/nowhere" in systemd.wait_for("STATUS", "failed: ").assignments["STATUS"]
        assert systemd.matching("STOPPING", "1")


def _forecasts(daemon: DaemonProcess) -> None:
    """Wait for some more."""
    before = daemon.metric("kronos_delivered_total")
    more = f"forecasts ({daemon.log_file})"
    wait_for(more, lambda: daemon.metric("kronos_delivered_total") >= before + 4)


# What is told, and to whom.


def test_nobody_is_told_where_nobody_listens() -> None:
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
def test_the_watchdog_may_be_meant_for_another(
    pid: str, seconds: float, systemd: FakeSystemd
) -> None:
    meant = str(os.getpid()) if pid == "ours" else pid
    environ = {"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": meant, "NOTIFY_SOCKET": systemd.address}
    notifier = Notifier.from_environ(environ)
    assert notifier.enabled
    assert notifier.watchdog_seconds == seconds
    assert environ == {}
    notifier.close()


@pytest.mark.parametrize("address", ["/nowhere/notify", "vsock:2:4711"])
def test_a_manager_that_is_not_there_is_a_warning(address: str) -> None:
    with capture_logs() as logs:
        notifier = Notifier.from_environ({"NOTIFY_SOCKET": address})
        notifier.notify(READY=1)
    assert [line["log_level"] for line in logs] == ["warning"]
    notifier.close()


def test_messages_are_lines_without_breaks(systemd: FakeSystemd) -> None:
    notifier = Notifier(systemd.address)
    notifier.notify(READY=1, STATUS="two\nlines, one of them\nSTOPPING=1 " + chr(0xDC80))
    assert (
        systemd.wait_for("READY", "1").assignments["STATUS"]
        == "two lines, one of them STOPPING=1 ?"
    )
    assert not systemd.matching("STOPPING")
    notifier.close()


def test_a_manager_that_is_busy_is_told_later_in_order(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as theirs:
        theirs.bind(str(tmp_path / "notify"))
        theirs.setblocking(False)  # noqa: FBT003
        notifier = Notifier(str(tmp_path / "notify"))
        sent = _MAX_PENDING + int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text("ascii"))
        for number in range(sent):  # nobody reads, nobody waits
            notifier.notify(X_NUMBER=number)
        heard: list[bytes] = []
        while b"X_NUMBER=last" not in heard:
            try:
                heard.append(theirs.recv(100))
            except BlockingIOError:
                notifier.notify(X_NUMBER="last")
        assert heard[:sent] == [f"X_NUMBER={number}".encode() for number in range(sent)]
        notifier.close()


@pytest.mark.parametrize(
    ("role", "rate"), [("forecast", "7 forecasts in the last minute"), ("ingest", "9 bars in the")]
)
def test_the_status_says_what_was_made(role: str, rate: str, systemd: FakeSystemd) -> None:
    class Quiet:
        """A daemon as far as it is told about."""

        settings = Settings(role=role)  # type: ignore[arg-type]
        metrics = Metrics()
        running, ready = asyncio.Event(), asyncio.Event()
        watchdog = Watchdog()
        series_count = 3

        def readiness(self) -> dict[str, str]:
            return {"sink kafka": "", "source binance": "away: https://me:secret@host\nis not"}

    async def work() -> None:
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

    daemon = Quiet()
    run_virtual(work())
    systemd.wait_for("STATUS", "not ready; following 3 series; source binance: away: ")
    told = systemd.wait_for("STATUS", f"not ready; following 3 series; {rate}").assignments[
        "STATUS"
    ]
    assert told.endswith("source binance: away: https://me:***@host is not")
    assert len(systemd.matching("STATUS")) == 2  # nothing is said twice


def test_what_waits_and_is_not_worked_off_is_overdue() -> None:
    waiting, done, patience = 0, 0, 10.0
    work = StallCheck("digging", lambda: waiting, lambda: done, lambda: patience)
    progress = Watchdog()
    assert progress.stalled(0.0) == ""
    progress.set_checks([work])
    assert progress.stalled(0.0) == ""
    assert progress.stalled(1000.0) == ""  # there was nothing to do
    waiting = 3
    assert progress.stalled(1001.0) == ""
    assert progress.stalled(1010.0) == ""
    assert progress.stalled(1011.0) == "digging: no progress for 11 s"
    patience = 900.0
    assert progress.stalled(1012.0) == ""
    done, patience = 1, 10.0
    assert progress.stalled(1500.0) == ""
    assert progress.stalled(1511.0) != ""
    waiting = 0
    assert progress.stalled(1512.0) == ""


# The unit.

UNITS = ROOT / "deploy" / "systemd"
PROGRAM = "/opt/kronos-stream/bin/kronos-stream"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A copy, of a program that is there."""
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("KRONOS_REQUIRE_SYSTEMD") == "1":
            pytest.fail("no systemd: no systemd-analyze on PATH")
        pytest.skip("not tested with systemd: no systemd-analyze on PATH")
    text = (UNITS / "kronos-stream.service").read_text("utf-8")
    program = Path(sys.executable).with_name("kronos-stream")
    assert text.count(PROGRAM) == 1
    copy = tmp_path / "kronos-stream.service"
    copy.write_text(text.replace(PROGRAM, str(program)), "utf-8")
    return copy


def _analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],  # noqa: S607
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("added", [[], ["gpu.conf"]], ids=["plain", "gpu"])
@pytest.mark.parametrize("name", ["kronos-stream", "kronos-ingest"])
def test_systemd_takes_the_unit(unit: Path, added: list[str], name: str) -> None:
    unit = unit.rename(unit.with_stem(name))
    folder = unit.with_name(f"{unit.name}.d")
    folder.mkdir()
    for one in added:
        shutil.copy(UNITS / one, folder)
    assert _analyze("verify", "--man=no", str(unit)) == ""


def test_systemd_would_say_what_is_wrong_with_it(unit: Path) -> None:
    unit.write_text(unit.read_text("utf-8") + "[Service]\nNoSuchSetting=1\n", "utf-8")
    with pytest.raises(AssertionError, match="NoSuchSetting"):
        assert _analyze("verify", "--man=no", str(unit)) == ""


def test_the_unit_is_shut_in(unit: Path) -> None:
    """Its exposure, in tenths of systemd's scale from 0 to 10."""
    said = _analyze("security", "--offline=true", "--threshold=20", str(unit))
    assert "Overall exposure level" in said


def test_what_the_page_installs_is_there(unit: Path, tmp_path: Path) -> None:
    """Its commands, into another folder and without a user above others."""
    page = (UNITS.parents[1] / "docs" / "systemd.md").read_text("utf-8")
    commands = re.findall(r"^\$ sudo (install .+)$", page, re.MULTILINE)
    assert len(commands) >= 5
    etc = tmp_path / "etc"
    (etc / "systemd" / "system").mkdir(parents=True)
    for command in commands:
        line = command.replace("/etc/", f"{etc}/")
        subprocess.run(shlex.split(line), cwd=UNITS.parents[1], check=True)
    named = set(re.findall(r"/etc/((?:systemd/system|kronos-stream)/[\w./-]+)", page))
    there = {str(path.relative_to(etc)) for path in etc.rglob("*")}
    assert "kronos-stream/kronos-stream.env" in named & there
    assert "systemd/system/kronos-stream.service.d/gpu.conf" in there
    installed = etc / "systemd" / "system" / "kronos-stream.service"
    unit.replace(installed)
    assert _analyze("verify", "--man=no", str(installed)) == ""


def test_a_command_runs_as_the_service_does() -> None:
    script = UNITS / "as-service"
    subprocess.run(["/bin/sh", "-n", script], check=True)
    text = (UNITS / "kronos-stream.service").read_text("utf-8")
    unit = {line.replace("%N", "$unit") for line in text.splitlines()}
    given = set(re.findall(r'--property="?([^"\s]+)', script.read_text("utf-8")))
    assert "LoadCredential=kronos_stream:/etc/kronos-stream/$unit.secrets" in given
    # Both are made up of the unit's name, where that is its own.
    made_up = {"User=$unit", "WorkingDirectory=/var/lib/$unit"}
    assert given - unit == {*made_up, "LoadCredential=$credential"}


@pytest.mark.parametrize(
    "added", [[], ["LoadCredential=kafka.key:/root/%N.key", "# LoadCredential=x:y"]]
)
def test_a_command_has_the_credentials_that_were_added(added: list[str], tmp_path: Path) -> None:
    """All but systemd itself is real: what runs in its place shows its options."""
    etc = tmp_path / "etc"
    etc.mkdir()
    if added:
        (etc / "kronos-ingest.service.d").mkdir()
        text = "\n".join(["[Service]", "LoadCredential=", *added])
        (etc / "kronos-ingest.service.d/override.conf").write_text(text, "utf-8")
    script = (UNITS / "as-service").read_text("utf-8")
    assert script.count("/etc/systemd/system/") == 1
    (tmp_path / "as-service").write_text(script.replace("/etc/systemd/system", str(etc)), "utf-8")
    shows = tmp_path / "systemd-run"
    shows.write_text(
        '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do echo "$1"; shift; done\nexec "$@"\n', "utf-8"
    )
    shows.chmod(0o755)
    ours = "/run/credentials/kronos-ingest.service"
    environ = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "UNIT": "kronos-ingest",
        "PROGRAM": "/usr/bin/env",
        "CREDENTIALS_DIRECTORY": "/run/credentials/run-u7.service",
        "KRONOS_STREAM_KAFKA__SSL_KEYFILE": f"{ours}/kafka.key",
        "KRONOS_STREAM_KAFKA__SSL_CAFILE": "/etc/kronos-stream/a b.pem",
    }
    line = ["/bin/sh", str(tmp_path / "as-service"), "WORDS=two of them"]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    options = {one for one in said if one.startswith("--property=LoadCredential=")}
    others = {"--property=LoadCredential=kafka.key:/root/kronos-ingest.key"} if added else set()
    secrets = "kronos_stream:/etc/kronos-stream/kronos-ingest.secrets"
    assert options == {f"--property=LoadCredential={secrets}", *others}
    there = environ["CREDENTIALS_DIRECTORY"]
    assert f"KRONOS_STREAM_SECRETS_DIR={there}" in said
    assert f"KRONOS_STREAM_KAFKA__SSL_KEYFILE={there}/kafka.key" in said
    assert "KRONOS_STREAM_KAFKA__SSL_CAFILE=/etc/kronos-stream/a b.pem" in said
    assert "WORDS=two of them" in said


def test_the_unit_and_the_daemon_agree() -> None:
    text = (UNITS / "kronos-stream.service").read_text("utf-8")
    grace = Settings.model_fields["stop_grace"].default
    (limit,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(limit) >= grace + 30
    assert "Environment=KRONOS_STREAM_SECRETS_DIR=%d" in text
    assert "LoadCredential=kronos_stream:" in text  # files: kronos_stream_NAME
    known = {setting.name for setting in describe_settings()}
    assert set(re.findall(r"KRONOS_STREAM_[A-Z_]+", text)) <= known


def test_the_example_of_settings_is_taken() -> None:
    example = (UNITS / "kronos-stream.env").read_text("utf-8")
    read_settings(dict(re.findall(r"^(KRONOS_STREAM_\w+)=(.*)$", example, re.MULTILINE)))
    others = set(re.findall(r"^#(KRONOS_STREAM_\w+)=", example, re.MULTILINE))
    assert others
    assert others <= {setting.name for setting in describe_settings()}
