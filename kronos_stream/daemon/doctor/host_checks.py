"""What ``kronos-stream doctor`` asks of this machine: the state file, the port, the model."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import aiohttp

from kronos_stream.daemon.config.settings import HttpSettings, variable_name
from kronos_stream.daemon.inference.backend import WorkerLost
from kronos_stream.daemon.inference.protocol import ForecastConfig
from kronos_stream.daemon.inference.supervisor import WorkerSupervisor
from kronos_stream.daemon.status.server import explain_bind_error
from kronos_stream.daemon.storage.database import APPLICATION_ID, lock_path
from kronos_stream.daemon.storage.schema import SCHEMA_VERSION
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.diagnostics import Finding
from kronos_stream.interfaces.probes import check_disk, run_in_thread
from kronos_stream.market.series import Series

_MAGIC = b"SQLite format 3\0"
_HEADER = struct.Struct(">60xI4xI")
"""Of an SQLite file, as far as it is ours: user_version and application_id."""

_HTTP_SECONDS = 3.0

_HIGH_LOAD = 0.5
"""Share of the time that forecasting may take before it is worth a word."""


async def check_state_file(path: Path) -> Sequence[Finding]:
    """Whether the state file can be used, and by whom it is."""
    setting = variable_name("state_file")
    owner = await run_in_thread(partial(_lock_holder, path))
    findings = [await run_in_thread(partial(check_disk, path, setting))]
    if owner is not None:
        findings.append(Finding("ok", f"{path}: in use by process {owner}: a daemon runs on it"))
    if fault := await run_in_thread(partial(_incompatibility, path)):
        cure = f"set {setting} to another file, or move this one away"
        findings.append(Finding("fail", f"{path}: {fault}", cure))
    return findings


async def check_port(settings: HttpSettings, state: Path | None) -> Sequence[Finding]:
    """Whether the pages can be served, and to whom. state: whose owner may be serving them."""
    host, number = settings.host, settings.port
    findings = []
    try:
        await run_in_thread(partial(_try_listen, host, number))
        findings.append(Finding("ok", f"{host}:{number} is free"))
    except OSError as error:
        alive = await _daemon_answers(host, number)
        ours = alive and state and await run_in_thread(partial(_lock_holder, state)) is not None
        found, _, cure = explain_bind_error(error, host, number).partition("; ")
        if alive and state is None:
            found = f"{host}:{number} is served by a daemon"
            cure = f"fine if it is this one; else give each its own {variable_name('http', 'port')}"
            findings.append(Finding("warn", found, cure))
        elif ours:
            findings.append(Finding("ok", f"{host}:{number} is served by the daemon that runs"))
        else:
            findings.append(Finding("fail", found, cure))
    if settings.token is None and host not in {"127.0.0.1", "::1", "localhost"}:
        cure = f"set {variable_name('http', 'token')}, or listen on 127.0.0.1"
        found = f"{host} is not for this machine alone, and there is no token: no series are told"
        findings.append(Finding("warn", found, cure))
    return findings


async def check_model(plan: ForecastConfig, series: Collection[Series]) -> Sequence[Finding]:
    """Whether the worker loads the model, and keeps up with so many series. Raises WorkerError."""
    worker = WorkerSupervisor(plan, Metrics())
    try:
        identity = await worker.start()
    except WorkerLost as error:
        return [Finding("fail", str(error), "see the lines above; most often memory runs out")]
    finally:
        await worker.close()
    one = worker.estimate_seconds(1)
    model, engine = identity
    found = f"{model.name} on {engine.device} in {engine.dtype}: {1000 * one:.3g} ms a series"
    return [Finding("ok", found), check_throughput(one, series)]


def check_throughput(seconds_per_series: float, series: Collection[Series]) -> Finding:
    """Whether ``one`` second per forecast is quick enough.

    At worst all bars close together, and what is not forecast before the next close of the
    shortest timeframe is overtaken by it.
    """
    counts = Counter(one.timeframe.min_milliseconds for one in series)
    if not counts:
        return Finding("warn", "no series is known, so nobody knows whether the model keeps up")
    load = sum(seconds_per_series * count / (length / 1000) for length, count in counts.items())
    shortest = min(counts) / 1000
    together = seconds_per_series * counts.total()
    found = (
        f"{counts.total()} series take {together:.2g} s when they close together, "
        f"{100 * load:.2g} % of the time in all"
    )
    cure = f"fewer series or {variable_name('paths')}, a smaller model, or a GPU"
    if load > 1:
        return Finding("warn", f"it cannot keep up: {found}", cure)
    if load > _HIGH_LOAD or together > shortest:
        return Finding("warn", f"it keeps up, but not at every close: {found}", cure)
    return Finding("ok", f"it keeps up: {found}")


def _lock_holder(path: Path) -> str | None:
    """The process that has a state file, None if it is free."""
    try:
        lock = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Shared, and let go at once: a daemon that starts just now hardly meets it.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(lock)
    return None


def _incompatibility(path: Path) -> str:
    """Why the file cannot be ours to go on with, by its first bytes; it is not opened as one."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError:  # told by whoever looked at the disk
        return ""
    if not head:
        return ""
    if not head.startswith(_MAGIC) or len(head) < _HEADER.size:
        return "not a state file"
    version, application = _HEADER.unpack(head)
    if application != APPLICATION_ID:
        return "a database of another program" if version or application else ""
    if version > SCHEMA_VERSION:
        return f"written by a newer version (schema {version}, ours is {SCHEMA_VERSION})"
    return ""


async def _daemon_answers(host: str, number: int) -> bool:
    """Whether a daemon's page answers there."""
    with suppress(aiohttp.ClientError, OSError):
        timeout = aiohttp.ClientTimeout(_HTTP_SECONDS)
        there = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - all, as set
        url = f"http://{f'[{there}]' if ':' in there else there}:{number}/healthz"
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return (await answer.content.read(16)) == b"alive\n"
    return False


def _try_listen(host: str, number: int) -> None:
    """For a moment. Raises OSError where that is impossible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, number), family=family).close()
