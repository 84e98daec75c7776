"""Training loop shared by both stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kronos_stream.training.errors import TrainingError
from kronos_stream.training.optimise import Optimisers, checkpoint_blocks, clip_gradients
from kronos_stream.training.processes import ProcessGroup
from kronos_stream.training.settings import TrainSettings
from kronos_stream.training.stages import Evaluation, StageRun
from kronos_stream.training.store import RunFolder
from kronos_stream.training.windows import (
    Batch,
    WindowSource,
    draw_lookbacks,
    make_batch,
)

VALIDATION_STEP = 2**31
"""Step number for drawing held-out windows; larger than any training step."""

ReportCallback = Callable[[int, Mapping[str, Any]], None]
"""Called with each logged step and its metrics, for progress display or logging."""

_CHANGEABLE_SETTINGS = {
    "steps",
    "stop_at",
    "device",
    "threads",
    "log_every",
    "save_every",
    "eval_every",
    "half",
    "accumulate",
    "grad_checkpoint",
    "data",
    "tokenizer",
    "init",
}
"""Settings that may differ in a resumed run: no effect on results, or deliberate changes."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Window sources of a run; ``valid`` is None if there are too few held-out data."""

    train: WindowSource
    valid: WindowSource | None


class Trainer:
    """Trains one stage in a run folder; resumes from the state in the folder."""

    def __init__(
        self,
        stage: StageRun,
        data: TrainingData,
        settings: TrainSettings,
        folder: Path,
        *,
        device: torch.device,
        processes: ProcessGroup | None = None,
        report: ReportCallback | None = None,
    ) -> None:
        self._stage, self._data, self._settings = stage, data, settings
        self._device, self._processes = device, processes or ProcessGroup()
        self._report = report or (lambda _step, _figures: None)
        self._folder = RunFolder(folder)
        self._optimisers = Optimisers(stage.network, settings)
        self._parameters = list(stage.network.parameters())
        self.step = 0
        self._best: tuple[float, dict[str, torch.Tensor]] | None = None
        self._bad_evaluations = 0
        if settings.batch % (self._processes.world * settings.accumulate):
            raise TrainingError(
                f"batch {settings.batch} is not a multiple of {self._processes.world} processes x "
                f"accumulate {settings.accumulate}"
            )
        if settings.grad_checkpoint:
            checkpoint_blocks(stage.network)
        if self._processes.is_main:
            self._folder.create()
        self._processes.barrier()
        self._resume()

    def run(self) -> Evaluation | None:
        """Train to the last step; return the last evaluation, None without held-out data."""
        s, result = self._settings, None
        held_out = self._held_out_batches()
        began, since = time.monotonic(), self.step
        end = min(s.steps, s.stop_at or s.steps)
        while self.step < end:
            figures = self._train_step()
            self.step += 1
            last = self.step == end
            if self.step % s.log_every == 0 or last:
                pace = (self.step - since) / (time.monotonic() - began)
                self._log({**figures, "steps_per_second": round(pace, 3)})
            if held_out and (self.step % s.eval_every == 0 or last):
                result = self._evaluate(held_out)
                if s.early_stop and self._bad_evaluations >= s.early_stop:
                    self._log({"stopped_early": True})
                    self._save()
                    break
            if self.step % s.save_every == 0 or last:
                self._save()
        if s.early_stop and self._best is not None:
            self._stage.network.load_state_dict(self._best[1])
        if self._processes.is_main:
            self._folder.export(self._stage.network, half=s.half)
        if result is None and held_out:
            result = self._stage.evaluate(held_out)
        self._processes.barrier()
        return result

    def gradients(self) -> dict[str, torch.Tensor]:
        """Compute the gradients of the current step; return the parts of the loss."""
        s, world = self._settings, self._processes.world
        rows = np.arange(self._processes.rank, s.batch, world)
        # The seed depends only on the step, so a resumed run draws the same random numbers.
        torch.manual_seed((s.seed * 1_000_003 + self.step) * 64 + self._processes.rank)
        lookbacks = draw_lookbacks(s.seed, self.step, s.batch, s.lookback_min, s.lookback_max)
        totals: dict[str, torch.Tensor] = {}
        for micro in np.split(rows, s.accumulate):
            windows = self._data.train.draw(self.step, s.batch, micro)
            batch = make_batch(windows, lookbacks[micro], s.lookback_weight, self._device)
            loss, parts = self._stage.loss(batch)
            (loss / s.accumulate).backward()
            for name, part in {"loss": loss, **parts}.items():
                value = part.detach() / s.accumulate
                totals[name] = totals[name] + value if name in totals else value
        self._processes.average_gradients(self._parameters)
        return totals

    def _train_step(self) -> dict[str, float]:
        totals = self.gradients()
        names = list(totals)
        values = self._processes.average(torch.stack([totals[n] for n in names])).tolist()
        figures = dict(zip(names, values, strict=True))
        norm = clip_gradients(self._parameters, self._settings.clip).item()
        if not np.isfinite(norm) or not np.isfinite(figures["loss"]):
            raise TrainingError(
                f"step {self.step}: the loss is not finite; lower lr or check the data; "
                f"the last checkpoint in {self._folder.path} is intact"
            )
        rate = self._optimisers.step(self.step)
        return {**figures, "grad_norm": norm, "lr": rate}

    def _held_out_batches(self) -> list[Batch]:
        s, source = self._settings, self._data.valid
        if source is None:
            return []
        n = s.valid_windows
        lookbacks = draw_lookbacks(s.seed, VALIDATION_STEP, n, s.lookback_min, s.lookback_max)
        return [
            make_batch(source.draw(VALIDATION_STEP, n, rows), lookbacks[rows], 1.0, self._device)
            for rows in np.array_split(np.arange(n), -(-n // 16))
        ]

    def _evaluate(self, held_out: list[Batch]) -> Evaluation:
        result = self._stage.evaluate(held_out)
        record: dict[str, Any] = {f"valid_{k}": v for k, v in result.figures.items()}
        if result.warning:
            record["warning"] = result.warning
        self._log(record)
        if self._best is None or result.score < self._best[0]:
            weights = self._stage.network.state_dict() if self._settings.early_stop else {}
            self._best = result.score, {k: v.clone() for k, v in weights.items()}
            self._bad_evaluations = 0
        else:
            self._bad_evaluations += 1
        return result

    def _log(self, figures: Mapping[str, Any]) -> None:
        if self._processes.is_main:
            self._folder.log({"step": self.step, **figures})
            self._report(self.step, figures)

    def _save(self) -> None:
        if not self._processes.is_main:
            return
        self._folder.write_state(
            {
                "step": self.step,
                "settings": self._settings.to_dict(),
                "network": self._stage.network.state_dict(),
                "optimisers": self._optimisers.state(),
                "best": self._best,
                "bad_evaluations": self._bad_evaluations,
            }
        )

    def _resume(self) -> None:
        state = self._folder.load(self._device)
        if state is None:
            if self._processes.is_main:
                self._folder.write_settings(self._settings.to_dict())
            return
        was, now = state["settings"], self._settings.to_dict()
        changed = [k for k in now if k not in _CHANGEABLE_SETTINGS and was.get(k) != now[k]]
        if changed:
            raise TrainingError(
                f"{self._folder.path} holds a run with other settings ({', '.join(changed)}); "
                "resume with the same settings, or choose another folder"
            )
        self._stage.network.load_state_dict(state["network"])
        self._optimisers.restore(state["optimisers"])
        self.step, self._best = state["step"], state["best"]
        self._bad_evaluations = state["bad_evaluations"]
        if self._processes.is_main:
            self._folder.rewind_metrics(self.step)
