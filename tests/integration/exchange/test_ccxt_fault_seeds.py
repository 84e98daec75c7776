"""ccxt against the simulated exchange with random faults, in virtual time.

A seed is a run of :mod:`tests.support.chaos` in one of the two modes. Repeat a failed one with

    KRONOS_SEEDS=123 make test ARGS="tests/integration/exchange/test_ccxt_fault_seeds.py"
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support.ccxt_exchange import ccxt_options, use_loop_time
from tests.support.chaos import ConnectorSetup
from tests.support.chaos_checks import check_seed
from tests.support.chaos_scenario import selected_seeds

MODES = ("watch", "poll")


@pytest.fixture(autouse=True)
def _loop_time(monkeypatch: pytest.MonkeyPatch) -> None:
    use_loop_time(monkeypatch)


def check(seed: int, mode: str, folder: Path) -> None:
    """Run a seed; with odd ones clients are replaced every minute or so, else every few hours."""
    hours = 0.02 if seed % 2 else 6.0
    connect = partial(ccxt_options, mode=mode, restart_hours=hours)
    check_seed(seed, folder, ConnectorSetup("ccxt.binance", connect, has_amounts=False))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", selected_seeds(range(3)))
def test_seed(seed: int, mode: str, tmp_path: Path) -> None:
    check(seed, mode, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", selected_seeds(range(2_000, 2_050)))
def test_soak_seed(seed: int, mode: str, tmp_path: Path) -> None:
    check(seed, mode, tmp_path)
