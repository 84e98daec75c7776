"""Checks of this machine: the state file, the HTTP port, the model."""

from __future__ import annotations

import socket
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
from kronos_stream.daemon.storage.database import incompatibility, lock_owner
from kronos_stream.daemon.storage.schema import SCHEMA_VERSION
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.interfaces.diagnostics import Finding
from kronos_stream.interfaces.probes import check_disk, run_in_thread
from kronos_stream.market.series import Series

_HTTP_SECONDS = 3.0

_HIGH_LOAD = 0.5
"""Share of the time spent on inference above which the check warns."""


async def check_state_file(path: Path) -> Sequence[Finding]:
    """Check that the state file can be used; report the daemon that uses it."""
    setting = variable_name("state_file")
    owner = await run_in_thread(partial(lock_owner, path))
    findings = [await run_in_thread(partial(check_disk, path, setting))]
    if owner is not None:
        findings.append(Finding("ok", f"{path}: in use by process {owner}, a daemon"))
    if problem := await run_in_thread(partial(incompatibility, path, SCHEMA_VERSION)):
        remedy = f"set {setting} to another file, or move this one away"
        findings.append(Finding("fail", f"{path}: {problem}", remedy))
    return findings


async def check_port(settings: HttpSettings, state_file: Path | None) -> Sequence[Finding]:
    """Check that the HTTP server can listen, and whether remote clients can read series.

    state_file: if its daemon runs, that daemon may use the port.
    """
    host, port = settings.host, settings.port
    findings = []
    try:
        await run_in_thread(partial(_try_listen, host, port))
        findings.append(Finding("ok", f"{host}:{port} is free"))
    except OSError as error:
        found, _, remedy = explain_bind_error(error, host, port).partition("; ")
        if not await _daemon_answers(host, port):
            findings.append(Finding("fail", found, remedy))
        elif state_file is None:
            found = f"{host}:{port} is used by a daemon"
            setting = variable_name("http", "port")
            remedy = f"fine if it is this one; otherwise give each its own {setting}"
            findings.append(Finding("warn", found, remedy))
        elif await run_in_thread(partial(lock_owner, state_file)) is not None:
            findings.append(Finding("ok", f"{host}:{port} is used by the running daemon"))
        else:
            findings.append(Finding("fail", found, remedy))
    if settings.token is None and host not in {"127.0.0.1", "::1", "localhost"}:
        remedy = f"set {variable_name('http', 'token')}, or listen on 127.0.0.1"
        found = f"other machines can connect to {host}, but without a token cannot read /series"
        findings.append(Finding("warn", found, remedy))
    return findings


async def check_model(config: ForecastConfig, series: Collection[Series]) -> Sequence[Finding]:
    """Check that the model loads and is fast enough for ``series``. Raises WorkerError."""
    worker = WorkerSupervisor(config, Metrics())
    try:
        identity = await worker.start()
    except WorkerLost as error:
        return [
            Finding("fail", str(error), "see the lines above; a common cause is lack of memory")
        ]
    finally:
        await worker.close()
    seconds = worker.estimate_seconds(1)
    model, engine = identity
    found = f"{model.name} on {engine.device} in {engine.dtype}: {1000 * seconds:.3g} ms a series"
    return [Finding("ok", found), check_throughput(seconds, series)]


def check_throughput(seconds_per_series: float, series: Collection[Series]) -> Finding:
    """Check that forecasts keep up with the bars of ``series``.

    In the worst case all bars close together; forecasts that are not done before the next close of
    the shortest timeframe are skipped.
    """
    counts = Counter(one.timeframe.min_milliseconds for one in series)
    if not counts:
        return Finding("warn", "no series is known, so the throughput cannot be checked")
    load = sum(seconds_per_series * count / (length / 1000) for length, count in counts.items())
    shortest = min(counts) / 1000
    together = seconds_per_series * counts.total()
    found = (
        f"{counts.total()} series take {together:.2g} s when they close together, "
        f"{100 * load:.2g} % of the time in all"
    )
    remedy = f"use fewer series or {variable_name('paths')}, a smaller model, or a GPU"
    if load > 1:
        return Finding("warn", f"it cannot keep up: {found}", remedy)
    if load > _HIGH_LOAD or together > shortest:
        return Finding("warn", f"it keeps up, but not at every close: {found}", remedy)
    return Finding("ok", f"it keeps up: {found}")


async def _daemon_answers(host: str, port: int) -> bool:
    """Return whether a daemon answers on this address."""
    with suppress(aiohttp.ClientError, OSError):
        timeout = aiohttp.ClientTimeout(_HTTP_SECONDS)
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - as configured
        url = f"http://{f'[{local}]' if ':' in local else local}:{port}/healthz"
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            return (await response.content.read(16)) == b"alive\n"
    return False


def _try_listen(host: str, port: int) -> None:
    """Listen for a moment. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()
