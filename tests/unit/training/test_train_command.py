"""Train command: resuming after a kill, several processes, one-line errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kronos_stream.testing.market import Market
from kronos_stream.training.settings import Stage
from tests.support.small_training import command, difference, run, trained, weights


def test_both_stages_train_and_their_checkpoints_load(candles: Path, tmp_path: Path) -> None:
    common = ("--steps=60", "--log-every=10", "--eval-every=30", "--lr=0.01")
    first = run(command("tokenizer", candles, tmp_path / "tokenizer", *common))
    assert first.returncode == 0, first.stderr
    named = ("--tokenizer", str(tmp_path / "tokenizer"))
    second = run(command("predictor", candles, tmp_path / "predictor", *common, *named))
    assert second.returncode == 0, second.stderr
    for stage in ("tokenizer", "predictor"):
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = [r["loss"] for r in records if "loss" in r]
        assert len(losses) == 6
        assert losses[-1] < losses[0]
    assert any(
        "valid_s1_perplexity" in line
        for line in (tmp_path / "tokenizer" / "metrics.jsonl").read_text().splitlines()
    )

    from kronos_stream import Context, Forecaster
    from kronos_stream.compat import Kronos, KronosTokenizer

    forecaster = Forecaster.from_pretrained(tmp_path, max_context=32, device="cpu")
    bars = Market(1, 300_000, seed=9).run(24)
    context = Context(bars.values[:, 0], bars.times)
    paths = forecaster.sample([context], horizon=3, paths=2)[0]
    assert paths.shape == (2, 3, 6)
    assert np.isfinite(paths).all()
    Kronos.from_pretrained(tmp_path / "predictor")
    KronosTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_killed_run_resumes_to_identical_weights(candles: Path, tmp_path: Path) -> None:
    settings = ("--steps=200", "--save-every=10", "--optimizer=muon", "--log-every=10")
    whole = run(command("tokenizer", candles, tmp_path / "whole", *settings))
    assert whole.returncode == 0, whole.stderr
    arguments = command("tokenizer", candles, tmp_path / "killed", *settings)
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"step": 100,' in metrics.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = run(arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line
    ]
    assert steps == list(range(10, 201, 10))


@pytest.mark.parametrize("stage", ["tokenizer", "predictor"])
def test_two_processes_give_the_weights_of_one(
    stage: Stage, candles: Path, tokenizer: Path, tmp_path: Path
) -> None:
    more = ["--steps=10", "--entropy-group=4"]
    if stage == "predictor":
        more += ["--tokenizer", str(tokenizer)]
    one = run(command(stage, candles, tmp_path / "one", *more))
    assert one.returncode == 0, one.stderr
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = run(command(stage, candles, tmp_path / "two", *more), launcher)
    assert two.returncode == 0, two.stderr
    assert difference(trained(tmp_path / "one"), trained(tmp_path / "two")) <= 1e-5


def test_an_invalid_file_is_reported_in_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("time,open\n1,2\n")
    done = run(command("tokenizer", bad, tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing column" in done.stderr
    assert not (tmp_path / "out").exists()
