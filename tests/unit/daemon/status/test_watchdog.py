"""Detection of stalled tasks."""

from __future__ import annotations

from kronos_stream.daemon.status.watchdog import StallCheck, Watchdog


def test_pending_work_without_progress_is_a_stall() -> None:
    pending, done, timeout = 0, 0, 10.0
    watchdog = Watchdog()
    assert watchdog.stalled(0.0) == ""
    watchdog.set_checks([StallCheck("digging", lambda: pending, lambda: done, lambda: timeout)])
    assert watchdog.stalled(0.0) == ""
    assert watchdog.stalled(1000.0) == ""  # nothing was pending
    pending = 3
    assert watchdog.stalled(1001.0) == ""
    assert watchdog.stalled(1010.0) == ""
    assert watchdog.stalled(1011.0) == "digging: no progress for 11 s"
    timeout = 900.0
    assert watchdog.stalled(1012.0) == ""
    done, timeout = 1, 10.0
    assert watchdog.stalled(1500.0) == ""
    assert watchdog.stalled(1511.0) != ""
    pending = 0
    assert watchdog.stalled(1512.0) == ""


def test_all_stalled_tasks_are_named() -> None:
    watchdog = Watchdog()
    checks = [
        StallCheck(name, lambda: True, lambda: None, lambda: 5.0) for name in ("reading", "saving")
    ]
    watchdog.set_checks(checks[:1], checks[1:])
    assert watchdog.stalled(0.0) == ""
    assert watchdog.stalled(6.0) == "reading: no progress for 6 s; saving: no progress for 6 s"
