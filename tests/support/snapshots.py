"""Comparison with the stored snapshots of public behaviour in ``tests/data/snapshots``."""

from __future__ import annotations

import os
from difflib import unified_diff

import pytest

from tests.support.paths import DATA

_SNAPSHOTS = DATA / "snapshots"


def check_snapshot(name: str, text: str) -> None:
    """Compare ``text`` with the stored file, byte for byte.

    KRONOS_UPDATE_SNAPSHOTS=1 writes the file instead.
    """
    path = _SNAPSHOTS / name
    if os.environ.get("KRONOS_UPDATE_SNAPSHOTS") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    stored = path.read_bytes().decode() if path.exists() else ""
    if text != stored:
        before, now = (part.splitlines(keepends=True) for part in (stored, text))
        difference = "".join(unified_diff(before, now, f"stored {name}", "now"))
        pytest.fail(f"{name} differs from the stored snapshot:\n{difference}", pytrace=False)
