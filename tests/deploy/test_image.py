"""The Dockerfile, without an engine: linter, stages, user, and the health check.

The built image is looked over by tests/deploy/test_image_built.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from kronos_stream.daemon.config.settings import HttpSettings
from kronos_stream.daemon.status.endpoints import Endpoints
from kronos_stream.daemon.status.series import SeriesStatusRegistry
from kronos_stream.daemon.status.server import StatusServer
from kronos_stream.daemon.telemetry.metrics import Metrics
from kronos_stream.market.clock import SystemClock
from tests.support.paths import ROOT

DOCKERFILE = ROOT / "Dockerfile"
HEALTH = ROOT / "deploy" / "image" / "healthcheck.py"

Stage = list[tuple[str, str]]
"""Its instructions: name and rest."""


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    """Instructions from the first FROM on."""
    with DOCKERFILE.open("rb") as file:
        parsed = DockerfileParser(fileobj=file).structure
    found: list[Stage] = []
    for part in parsed:
        name, rest = str(part["instruction"]), " ".join(str(part["value"]).split())
        if name == "FROM":
            found.append([])
        if found and name != "COMMENT":
            found[-1].append((name, rest))
    return found


def _arguments_of(stage: Stage, name: str) -> list[str]:
    return [rest for one, rest in stage if one == name]


def _hadolint(text: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    command = [str(program), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_hadolint_finds_no_fault() -> None:
    ended = _hadolint(DOCKERFILE.read_text("utf-8"))
    assert (ended.returncode, ended.stdout) == (0, "")
    spoilt = _hadolint("FROM debian:latest\nRUN cd /tmp && apt-get install -y gcc\nCMD run\n")
    assert {"DL3007", "DL3003", "DL3025"} <= set(re.findall(r"DL\d+", spoilt.stdout))


def test_stages_start_from_the_base_or_another_stage(stages: list[Stage]) -> None:
    begins = [_arguments_of(stage, "FROM")[0].split(" AS ") for stage in stages]
    names = {name for _, *named in begins for name in named}
    assert {source for source, *_ in begins} - names == {"${BASE}"}
    assert len(stages) >= 3
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)
    tag = base.rpartition(":")[2]
    assert re.match(r"3\.\d+-slim-\w+", tag), "a Python and a Debian are named"
    python = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    assert tag.startswith(f"{python['python_version']}-"), "the one that is tested"


def test_final_stage_runs_as_an_unprivileged_user(stages: list[Stage]) -> None:
    last = stages[-1]
    assert _arguments_of(last, "USER") == ["10001:10001"]
    ours = [i for i, (name, _) in enumerate(last) if name == "USER"]
    assert not [name for name, _ in last[ours[0] :] if name in {"RUN", "COPY", "ADD"}]
    assert json.loads(_arguments_of(last, "ENTRYPOINT")[0]) == ["kronos-stream"]
    assert json.loads(_arguments_of(last, "CMD")[0]) == ["run"]
    assert _arguments_of(last, "STOPSIGNAL") == ["SIGTERM"]
    assert _arguments_of(last, "VOLUME") == ["/var/lib/kronos-stream"]
    (health,) = _arguments_of(last, "HEALTHCHECK")
    command = json.loads(health.partition(" CMD ")[2])
    copied = [rest.split()[-1] for rest in _arguments_of(last, "COPY")]
    assert command[-1] in copied
    assert not [rest for stage in stages for rest in _arguments_of(stage, "ADD")]


def test_final_stage_builds_nothing(stages: list[Stage]) -> None:
    runs = " ".join(_arguments_of(stages[-1], "RUN"))
    assert not re.findall(r"\b(apt-get|apt|curl|wget|git|gcc|make)\b", runs)
    assert not [
        rest for rest in _arguments_of(stages[-1], "ENV") if re.search(r"TOKEN|PASSWORD", rest)
    ]
    pips = [
        command
        for stage in stages[:-1]
        for run in _arguments_of(stage, "RUN")
        for command in re.split(r"[;{}] ", run)
        if " pip " in command and " install " in command
    ]
    assert len(pips) == 3
    pinned = ("--constraint constraints.txt", '"pip==${PIP_VERSION}"')
    assert [command for command in pips if not any(pin in command for pin in pinned)] == []


def test_build_context_holds_only_copied_files(stages: list[Stage]) -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing but what is named"
    sent = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    copied = {
        word
        for stage in stages
        for rest in _arguments_of(stage, "COPY")
        if "--from=" not in rest
        for word in rest.split()[:-1]
        if not word.startswith("--")
    }
    wheel = {"LICENSE", "README.md", "connectors", "kronos_stream", "pyproject.toml"}
    assert wheel <= copied
    assert {name for name in copied if not any(name.startswith(rule) for rule in sent)} == set()
    assert {rule for rule in sent if not any(name.startswith(rule) for name in copied)} == set()


def test_scripts_have_valid_syntax() -> None:
    scripts = sorted((ROOT / "deploy" / "image").glob("*.sh"))
    assert len(scripts) >= 3
    for script in scripts:
        command = ["bash", "-n", str(script)]
        read = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, "")
        assert os.access(script, os.X_OK)


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port without a server."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


async def _healthy(host: str | None, port: int | str) -> tuple[int | None, str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KRONOS_STREAM_")}
    environ["KRONOS_STREAM_HTTP__PORT"] = str(port)
    if host is not None:
        environ["KRONOS_STREAM_HTTP__HOST"] = host
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(HEALTH), env=environ, stderr=asyncio.subprocess.PIPE
    )
    _, output = await process.communicate()
    return process.returncode, output.decode()


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", [None, "", "127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])  # noqa: S104
async def test_health_check_finds_the_daemon_at_its_address(host: str | None) -> None:
    clock = SystemClock()
    pages = Endpoints(Metrics(), dict, SeriesStatusRegistry(clock), clock)
    if host and ":" in host and not _has_ipv6():
        pytest.skip("no IPv6 here")
    async with StatusServer(HttpSettings(host=host or "127.0.0.1", port=0), pages) as served:
        assert await _healthy(host, served.port) == (0, "")


async def test_health_check_fails_without_an_answer(unused_port: int) -> None:
    status, output = await _healthy(None, unused_port)
    assert (status, f"no answer from 127.0.0.1:{unused_port}" in output) == (1, True)
    status, output = await _healthy(None, "http")
    assert (status, "Traceback" in output) == (1, False)


async def test_health_check_fails_if_the_daemon_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # and never answers
        status, output = await _healthy(None, listening.getsockname()[1])
    assert (status, "timed out" in output) == (1, True)
