"""systemd units of deploy/systemd: valid, sandboxed, and consistent with the documentation."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.reference import describe_settings
from kronos_stream.daemon.config.settings import Settings
from tests.support.paths import ROOT

if sys.platform != "linux":
    pytest.skip("not tested: systemd runs on Linux only", allow_module_level=True)

UNITS = ROOT / "deploy" / "systemd"
PROGRAM = "/opt/kronos-stream/bin/kronos-stream"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Copy of the unit that runs this environment's program."""
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
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("added", [[], ["gpu.conf"]], ids=["plain", "gpu"])
@pytest.mark.parametrize("name", ["kronos-stream", "kronos-ingest"])
def test_unit_is_valid(unit: Path, added: list[str], name: str) -> None:
    unit = unit.rename(unit.with_stem(name))
    folder = unit.with_name(f"{unit.name}.d")
    folder.mkdir()
    for drop_in in added:
        shutil.copy(UNITS / drop_in, folder)
    assert _analyze("verify", "--man=no", str(unit)) == ""


def test_invalid_unit_is_detected(unit: Path) -> None:
    unit.write_text(unit.read_text("utf-8") + "[Service]\nNoSuchSetting=1\n", "utf-8")
    with pytest.raises(AssertionError, match="NoSuchSetting"):
        assert _analyze("verify", "--man=no", str(unit)) == ""


def test_unit_is_sandboxed(unit: Path) -> None:
    """Exposure is at most 2.0 on systemd's scale from 0 to 10."""
    report = _analyze("security", "--offline=true", "--threshold=20", str(unit))
    assert "Overall exposure level" in report


def test_documented_commands_install_the_units(unit: Path, tmp_path: Path) -> None:
    """Run the commands of docs/systemd.md with another folder in place of /etc."""
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


def test_as_service_sets_the_properties_of_the_unit() -> None:
    script = UNITS / "as-service"
    subprocess.run(["/bin/sh", "-n", script], check=True)
    text = (UNITS / "kronos-stream.service").read_text("utf-8")
    unit = {line.replace("%N", "$unit") for line in text.splitlines()}
    given = set(re.findall(r'--property="?([^"\s]+)', script.read_text("utf-8")))
    assert "LoadCredential=kronos_stream:/etc/kronos-stream/$unit.secrets" in given
    # These contain the name of the unit.
    named = {"User=$unit", "WorkingDirectory=/var/lib/$unit"}
    assert given - unit == {*named, "LoadCredential=$credential"}


@pytest.mark.parametrize(
    "added", [[], ["LoadCredential=kafka.key:/root/%N.key", "# LoadCredential=x:y"]]
)
def test_as_service_passes_credentials_of_drop_ins(added: list[str], tmp_path: Path) -> None:
    """A script in place of systemd-run prints its options and runs the command."""
    etc = tmp_path / "etc"
    etc.mkdir()
    if added:
        (etc / "kronos-ingest.service.d").mkdir()
        text = "\n".join(["[Service]", "LoadCredential=", *added])
        (etc / "kronos-ingest.service.d/override.conf").write_text(text, "utf-8")
    script = (UNITS / "as-service").read_text("utf-8")
    assert script.count("/etc/systemd/system/") == 1
    (tmp_path / "as-service").write_text(script.replace("/etc/systemd/system", str(etc)), "utf-8")
    systemd_run = tmp_path / "systemd-run"
    systemd_run.write_text(
        '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do echo "$1"; shift; done\nexec "$@"\n', "utf-8"
    )
    systemd_run.chmod(0o755)
    credentials = "/run/credentials/kronos-ingest.service"
    environ = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "UNIT": "kronos-ingest",
        "PROGRAM": "/usr/bin/env",
        "CREDENTIALS_DIRECTORY": "/run/credentials/run-u7.service",
        "KRONOS_STREAM_KAFKA__SSL_KEYFILE": f"{credentials}/kafka.key",
        "KRONOS_STREAM_KAFKA__SSL_CAFILE": "/etc/kronos-stream/a b.pem",
    }
    line = ["/bin/sh", str(tmp_path / "as-service"), "WORDS=two of them"]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, check=True)
    printed = done.stdout.splitlines()
    options = {line for line in printed if line.startswith("--property=LoadCredential=")}
    others = {"--property=LoadCredential=kafka.key:/root/kronos-ingest.key"} if added else set()
    secrets = "kronos_stream:/etc/kronos-stream/kronos-ingest.secrets"
    assert options == {f"--property=LoadCredential={secrets}", *others}
    directory = environ["CREDENTIALS_DIRECTORY"]
    assert f"KRONOS_STREAM_SECRETS_DIR={directory}" in printed
    assert f"KRONOS_STREAM_KAFKA__SSL_KEYFILE={directory}/kafka.key" in printed
    assert "KRONOS_STREAM_KAFKA__SSL_CAFILE=/etc/kronos-stream/a b.pem" in printed
    assert "WORDS=two of them" in printed


def test_unit_matches_the_settings() -> None:
    text = (UNITS / "kronos-stream.service").read_text("utf-8")
    grace = Settings.model_fields["stop_grace"].default
    (limit,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(limit) >= grace + 30
    assert "Environment=KRONOS_STREAM_SECRETS_DIR=%d" in text
    assert "LoadCredential=kronos_stream:" in text  # files: kronos_stream_NAME
    known = {setting.name for setting in describe_settings()}
    assert set(re.findall(r"KRONOS_STREAM_[A-Z_]+", text)) <= known


def test_example_of_settings_is_valid() -> None:
    example = (UNITS / "kronos-stream.env").read_text("utf-8")
    read_settings(dict(re.findall(r"^(KRONOS_STREAM_\w+)=(.*)$", example, re.MULTILINE)))
    others = set(re.findall(r"^#(KRONOS_STREAM_\w+)=", example, re.MULTILINE))
    assert others
    assert others <= {setting.name for setting in describe_settings()}
