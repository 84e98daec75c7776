"""Apache Kafka as our tests run it: orphaned, it ends. The sink's tests kill and revive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.apache_kafka import ApacheKafka
from tests.support.paths import ROOT
from tests.support.processes import ProcessFailed, wait_for


def test_nodes_end_with_their_test_run(kafka_jars: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from tests.support.apache_kafka import ApacheKafka\n"
        f"kafka = ApacheKafka(Path({str(kafka_jars)!r}), Path({str(tmp_path)!r})); kafka.start()\n"
        "print(kafka.pids[0], flush=True); time.sleep(3600)"
    )
    command = [sys.executable, "-c", script]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None
    node = int(owner.stdout.readline())
    os.kill(node, 0)  # it runs
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    wait_for("the node has ended", lambda: not Path(f"/proc/{node}").exists() or _is_zombie(node))


def _is_zombie(pid: int) -> bool:
    """True if ``pid`` has ended, but process 1 of the container has not waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_missing_programs_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProcessFailed, match="no kafka_2"):
        ApacheKafka(tmp_path, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProcessFailed, match="no java"):
        ApacheKafka(tmp_path, tmp_path)
