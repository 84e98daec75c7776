"""Number of usable cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kronos_stream.daemon.config import cores


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("max 100000", 6),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("900000 100000", 6),
        ("nonsense", 6),
        (None, 6),
    ],
)
def test_usable_cores_are_limited_by_affinity_and_quota(
    quota: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "Path", lambda _: file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert cores.usable_cores() == count
