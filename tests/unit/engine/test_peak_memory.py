"""Peak memory of a call at the size for which a limit is documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kronos_stream import Forecaster
from kronos_stream.commands._bench import random_walk_contexts
from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.config import PUBLISHED_PREDICTORS, PUBLISHED_TOKENIZER

STATUS = Path("/proc/self/status")
PROMISED_MIB = 1.2e9 / 2**20


def memory_mib(field: str) -> float:
    """A memory field of this process's status, such as VmRSS or VmHWM (the peak)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text("ascii").splitlines())
    return float(lines[field].split()[0]) / 1024


@pytest.mark.soak
@pytest.mark.skipif(not STATUS.exists(), reason="reads memory from /proc")
def test_peak_memory_of_small_8x32() -> None:
    """Kronos-small, 8 contexts x 32 paths x 24 bars from 488: at most 1.2 GB over the weights."""
    torch.manual_seed(0)
    predictor = Predictor(PUBLISHED_PREDICTORS["small"]).eval()
    tokenizer = Tokenizer(PUBLISHED_TOKENIZER).eval()
    forecaster = Forecaster(predictor, tokenizer, device="cpu", dtype="float32")
    forecaster.sample(random_walk_contexts(1, 32), 2, 1)  # libraries load on first use
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak counts from here
    before = memory_mib("VmRSS")
    forecaster.sample(random_walk_contexts(8, 488), 24, 32, top_p=0.9)
    grown = memory_mib("VmHWM") - before
    print(f"small 8x32: {grown:.0f} MiB over the weights")  # noqa: T201
    # Its caches alone are about 380 MiB: much less would mean that nothing was measured.
    assert 200 < grown < PROMISED_MIB
