"""Small training runs: settings, trainers and commands that take seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from kronos_stream.training.generated import GeneratedWindows
from kronos_stream.training.loop import Trainer, TrainingData
from kronos_stream.training.processes import ProcessGroup
from kronos_stream.training.settings import Stage, TrainSettings
from kronos_stream.training.stages import PredictorRun, StageRun, TokenizerRun

CPU = torch.device("cpu")


SMALL = {
    "window": 32, "lookback_min": 8, "lookback_max": 24, "d_model": 16, "n_heads": 4, "ff_dim": 32,
    "n_layers": 2, "s1_bits": 4, "s2_bits": 4, "batch": 4, "warmup": 5, "valid_windows": 8,
    "timeframes": ("5m",), "threads": 1,
}  # fmt: skip


def small(stage: Stage, **changed: object) -> TrainSettings:
    """Return settings of a network that trains in milliseconds."""
    return TrainSettings.build(stage, {**SMALL, "data": ("generated",), **changed})


def trainer(settings: TrainSettings, folder: Path) -> Trainer:
    """Return a trainer in this process, on generated markets."""
    torch.manual_seed(settings.seed)
    run: StageRun = (
        PredictorRun(settings, CPU)
        if settings.tokenizer
        else TokenizerRun(settings, CPU, ProcessGroup())
    )
    source = GeneratedWindows(settings.timeframes, settings.window, settings.seed)
    return Trainer(run, TrainingData(source, source), settings, folder, device=CPU)


def command(stage: Stage, data: Path, out: Path, *more: str) -> list[str]:
    """Return the arguments of the train command for a small network."""
    flags = [
        f"--{k.replace('_', '-')}={','.join(v) if isinstance(v, tuple) else v}"
        for k, v in SMALL.items()
    ]
    return ["-m", "kronos_stream", "train", stage, str(data), "--out", str(out), *flags, *more]


def run(arguments: Sequence[str], launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` until it ends."""
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the exported weights."""
    return load_file(folder / "model.safetensors")


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights without the bias of the unrotated keys.

    It does not change the softmax, so its gradient is only rounding, which Adam scales up.
    """
    loaded = weights(folder)
    loaded.pop("dep_layer.cross_attn.k_proj.bias", None)
    return loaded
