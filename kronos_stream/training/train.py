"""Entry point of training, for ``kronos-stream train`` and for scripts."""

from __future__ import annotations

from pathlib import Path

import torch

from kronos_stream.engine.device import pick_device
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.training.dataset import CandleDataset
from kronos_stream.training.errors import TrainingError
from kronos_stream.training.generated import GeneratedWindows
from kronos_stream.training.loop import ReportCallback, Trainer, TrainingData
from kronos_stream.training.processes import ProcessGroup, join_process_group
from kronos_stream.training.settings import GENERATED, Stage, TrainSettings
from kronos_stream.training.stages import Evaluation, PredictorRun, StageRun, TokenizerRun


def train(
    stage: Stage, settings: TrainSettings, out: Path, report: ReportCallback | None = None
) -> Evaluation | None:
    """Train ``stage`` in the folder ``out``, or resume the run it holds.

    Under ``torchrun`` every process calls this function. Returns the last metrics on
    held-out data. Raises TrainingError, CandleFileError or CheckpointError.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    processes = join_process_group(device)
    try:
        torch.manual_seed(settings.seed)  # so that all processes start from the same weights
        run: StageRun = (
            TokenizerRun(settings, device, processes)
            if stage == "tokenizer"
            else PredictorRun(settings, device)
        )
        # After the networks: a checkpoint that cannot be loaded leaves no folder behind.
        data = _data(settings, out, processes)
        trainer = Trainer(
            run, data, settings, out, device=device, processes=processes, report=report
        )
        return trainer.run()
    finally:
        processes.close()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return pick_device(name)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _data(settings: TrainSettings, out: Path, processes: ProcessGroup) -> TrainingData:
    s = settings
    if not s.data:
        raise TrainingError(f"no data given: give candle files, folders, or {GENERATED!r}")
    if s.data == (GENERATED,):
        return TrainingData(
            GeneratedWindows(s.timeframes, s.window, s.seed),
            GeneratedWindows(s.timeframes, s.window, s.seed, held_out=True),
        )
    if GENERATED in s.data:
        raise TrainingError(
            f"files and {GENERATED!r} markets cannot be combined: give one or the other"
        )

    def prepare() -> CandleDataset:
        return CandleDataset.prepare(
            [Path(p) for p in s.data],
            out / "data",
            s.window,
            timeframe=Timeframe.parse(s.timeframe) if s.timeframe else None,
            valid_share=s.valid_share,
            test_share=s.test_share,
        )

    if processes.is_main:  # the main process writes the store, the others read it
        dataset = prepare()
    processes.barrier()
    if not processes.is_main:
        dataset = prepare()
    train_windows = dataset.source("train", s.seed)
    if train_windows is None:
        raise TrainingError("no window to train on")  # already reported by prepare()
    return TrainingData(train_windows, dataset.source("valid", s.seed))
