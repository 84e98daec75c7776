"""The built image: its files, and the daemon in it as process 1 on a read-only root.

Needs the image and a container engine: ``make image-check`` builds the one, finds the other and
runs this. Elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.paths import ROOT
from tests.support.processes import wait_for

IMAGE = os.environ.get("KRONOS_IMAGE", "")
ENGINE = os.environ.get("KRONOS_ENGINE", "docker")
USER = 10001
STATE = "/var/lib/kronos-stream"
LEAST = [
    "--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=all",
    "--security-opt=no-new-privileges",
]  # fmt: skip
"""What an operator may take away from it."""

BUILDERS = r"(cc|gcc|g\+\+|c\+\+|clang|ld|as|make|cmake|rustc|cargo|git|nvcc|ptxas)(-[\d.]+)?"
INSTALLERS = r"(pip|easy_install|ensurepip|uv|conda|wheel)[\d.]*"
PROCESSES = """
import json, pathlib
def fields(text):
    name, rest = text.rsplit(")", 1)
    return name.split("(", 1)[1], *rest.split()[:2]
found = {}
for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        name, state, parent = fields((path / "stat").read_text())
        command = (path / "cmdline").read_text().replace(chr(0), " ")
    except OSError:
        continue
    found[path.name] = {"name": name, "state": state, "parent": parent, "command": command}
print(json.dumps(found))
"""

pytestmark = [
    pytest.mark.skipif(not IMAGE, reason="no image is named; make image-check builds one"),
    pytest.mark.timeout(1_800),
]


class Entry(NamedTuple):
    """A file of the image."""

    mode: int
    user: int
    kind: str
    path: str


def _engine(*arguments: str, within: float = 120.0) -> str:
    ended = subprocess.run(
        [ENGINE, *arguments], capture_output=True, text=True, timeout=within, check=False
    )
    assert ended.returncode == 0, f"{arguments}: {ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    (described,) = json.loads(_engine("image", "inspect", IMAGE))
    merged: dict[str, Any] = described["Config"]
    # Podman keeps some of it elsewhere.
    return merged | {"Healthcheck": merged.get("Healthcheck") or described.get("Healthcheck")}


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """Files of the root file system, read as root."""
    listing = ["--entrypoint=find", IMAGE, "/", "-xdev", "-printf", r"%m %U %y %p\n"]
    lines = _engine("run", "--rm", "--user=0:0", "--network=none", *listing).splitlines()
    found = []
    for line in lines:
        mode, user, kind, path = line.split(" ", 3)
        found.append(Entry(int(mode, 8), int(user), kind, path))
    assert len(found) > 10_000
    return found


def test_image_describes_how_it_runs(config: dict[str, Any]) -> None:
    assert config["User"] == f"{USER}:{USER}"
    assert (config["Entrypoint"], config["Cmd"]) == (["kronos-stream"], ["run"])
    assert config["StopSignal"] in {"SIGTERM", "15"}
    assert list(config["Volumes"]) == [STATE]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    labels = config["Labels"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert re.fullmatch(
        r"[0-9a-f]{40}(-dirty)?|unknown", labels["org.opencontainers.image.revision"]
    )


def test_image_has_no_build_tools(entries: list[Entry]) -> None:
    names = {entry.path for entry in entries if entry.kind in "fl"}
    tools = {path for path in names if re.search(rf"/s?bin/({BUILDERS}|{INSTALLERS})$", path)}
    assert {path for path in tools if "/triton/" not in path} == set()
    assert [p for p in names if re.search(rf"/(site|dist)-packages/{INSTALLERS}/", p)] == []
    assert [path for path in names if re.match(r"/var/lib/apt/lists/.*Packages", path)] == []
    assert [path for path in names if re.match(r"/var/cache/apt/.*\.(deb|bin)$", path)] == []
    assert [path for path in names if re.match(r"/root/\.|.*/\.cache/", path)] == [
        path for path in names if path in {"/root/.bashrc", "/root/.profile"}
    ]


def test_user_can_change_no_file(entries: list[Entry]) -> None:
    assert [entry for entry in entries if entry.kind == "f" and entry.mode & 0o6000] == []
    assert [entry.path for entry in entries if entry.user == USER] == [STATE]
    open_to_all = {
        entry.path
        for entry in entries
        if entry.kind != "l" and entry.mode & 0o002 and not entry.path.startswith("/dev")
    }
    assert open_to_all <= {"/tmp", "/var/tmp", "/run/lock"}  # noqa: S108 - as Debian has them


def test_package_is_the_wheel_with_bytecode(entries: list[Entry]) -> None:
    ours = [
        entry.path for entry in entries if re.search(r"/kronos_(stream|connectors)/", entry.path)
    ]
    sources = {path for path in ours if path.endswith(".py")}
    assert any(path.endswith("/daemon/app.py") for path in sources)
    packed = {re.sub(r"/__pycache__/(\w+)\.cpython-\d+\.pyc$", r"/\1.py", path) for path in ours}
    assert sources == {path for path in packed if path.endswith(".py")}
    assert len([path for path in ours if path.endswith(".pyc")]) == len(sources)
    foreign = {"Makefile", "pyproject.toml", "constraints.txt", "conftest.py", ".git"}
    assert {e.path for e in entries if Path(e.path).name in foreign} & set(ours) == set()
    assert [e.path for e in entries if e.path.startswith("/build")] == []


def test_image_has_pinned_versions_without_development_tools() -> None:
    output = _engine(
        "run", "--rm", "--network=none", "--entrypoint=python3", IMAGE, "-c",
        "import json; from importlib.metadata import distributions as d; "
        "print(json.dumps({x.metadata['Name']: x.version for x in d()}))",
    )  # fmt: skip
    installed = {_canonical(name): version for name, version in json.loads(output).items()}
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    )
    pins = {_canonical(name): version for name, version in pins.items()}
    different = {
        name: version
        for name, version in installed.items()
        if pins.get(name, version) != version.partition("+")[0]
    }
    assert different == {}
    # What torch itself pins, and ourselves.
    unpinned = r"kronos-stream|triton|cuda-toolkit|nvidia-.*"
    assert [n for n in installed if n not in pins and not re.fullmatch(unpinned, n)] == []
    assert {"pytest", "mypy", "ruff", "hypothesis", "pip"} & set(installed) == set()
    if installed["torch"].endswith("+cpu"):
        assert [name for name in installed if name.startswith("nvidia-")] == []


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_demo_runs_with_minimal_rights(config: dict[str, Any]) -> None:
    del config  # the image is there
    demo = ["demo", "--seconds", "8", "--symbols", "3", "--json"]
    output = _engine("run", "--rm", *LEAST, IMAGE, *demo)
    assert len(json.loads(output)["by_series"]) == 3


def test_invalid_setting_gives_one_line_and_exit_code_2() -> None:
    ended = subprocess.run(
        [ENGINE, "run", "--rm", *LEAST, "--env=KRONOS_STREAM_HORIZON=0", IMAGE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "KRONOS_STREAM_HORIZON=0" in ended.stderr


class Container:
    """A container in the network of ``exchange``, running until it is removed."""

    def __init__(self, *arguments: str) -> None:
        self.name = _engine("run", "--detach", *arguments).strip()

    def python(self, code: str) -> str:
        return _engine("exec", self.name, "python3", "-c", code)

    def processes(self) -> dict[str, dict[str, str]]:
        """Processes by id, without those of this command."""
        found: dict[str, dict[str, str]] = json.loads(self.python(PROCESSES))
        return {pid: it for pid, it in found.items() if PROCESSES[:20] not in it["command"]}

    def worker(self) -> str | None:
        """Process id of the worker."""
        found = self.processes().items()
        alive = [pid for pid, it in found if "worker_main" in it["command"] and it["state"] != "Z"]
        return alive[0] if alive else None

    def healthy(self) -> bool:
        checked = subprocess.run(
            [ENGINE, "exec", self.name, "python3", "-I", "/opt/kronos-stream/healthcheck.py"],
            capture_output=True, check=False,
        )  # fmt: skip
        return checked.returncode == 0

    def page(self, name: str) -> int:
        code = (
            "import urllib.request as r, urllib.error as e\n"
            f"try: print(r.urlopen('http://127.0.0.1:8080/{name}').status)\n"
            "except e.HTTPError as error: print(error.code)\n"
            "except OSError: print(0)"
        )
        return int(self.python(code))

    def remove(self) -> None:
        _engine("rm", "--force", "--volumes", self.name)


@pytest.fixture
def exchange() -> Iterator[Container]:
    one = Container(*LEAST, IMAGE, "exchange", "--symbols=2", "--timeframe=1s", "--port=9000")
    yield one
    one.remove()


@pytest.fixture
def volume() -> Iterator[str]:
    name = f"kronos-test-{os.getpid()}"
    _engine("volume", "create", name)
    yield name
    _engine("volume", "rm", "--force", name)


def _daemon(exchange: Container, volume: str) -> Container:
    settings = {
        "SYMBOLS": "binance:SIM00/USDT,binance:SIM01/USDT",
        "TIMEFRAMES": "1s",
        "SINKS": "jsonl",
        "JSONL__PATH": "forecasts.jsonl",
        "MODEL": "nano",
        "LOOKBACK": "96",
        "HORIZON": "8",
        "BINANCE__REST_URL": "http://127.0.0.1:9000",
        "BINANCE__WS_URL": "ws://127.0.0.1:9000",
    }
    given = [f"--env=KRONOS_STREAM_{name}={value}" for name, value in settings.items()]
    least = [f"--network=container:{exchange.name}", *LEAST[1:]]
    return Container(*least, f"--volume={volume}:{STATE}", *given, IMAGE)


def test_daemon_works_as_process_1(exchange: Container, volume: str) -> None:
    daemon = _daemon(exchange, volume)
    try:
        wait_for("it is healthy", daemon.healthy)
        wait_for("it is ready", lambda: daemon.page("readyz") == 200)
        first = daemon.processes()["1"]
        assert "kronos-stream run" in first["command"]
        killed = daemon.worker()
        assert killed is not None
        daemon.python(f"import os; os.kill({killed}, 9)")
        wait_for("another worker", lambda: daemon.worker() not in {None, killed})
        wait_for("no process is a zombie", lambda: not _dead(daemon))
        before = _lines(daemon)
        wait_for("forecasts continue", lambda: _lines(daemon) > before)
        _engine("stop", "--time=30", daemon.name)
        state = json.loads(_engine("inspect", daemon.name))[0]["State"]
        assert state["ExitCode"] == 0, _engine("logs", daemon.name)
    finally:
        daemon.remove()
    again = _daemon(exchange, volume)
    try:
        wait_for("it is ready again", lambda: again.page("readyz") == 200)
        assert _lines(again) >= before
        written = json.loads(again.python("import json, os; print(json.dumps(os.listdir()))"))
        assert [n for n in written if not n.startswith(("forecasts.jsonl", "state.sqlite"))] == []
    finally:
        again.remove()


def _dead(container: Container) -> list[str]:
    return [pid for pid, it in container.processes().items() if it["state"] == "Z"]


def _lines(container: Container) -> int:
    return int(container.python("print(sum(1 for line in open('forecasts.jsonl')))"))
