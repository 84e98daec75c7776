"""Progress display: a bar with the remaining time on a terminal, lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressReport:
    """Report callback that shows steps and metrics."""

    def __init__(self, title: str, steps: int, stream: TextIO) -> None:
        self._console = Console(file=stream, soft_wrap=True, highlight=False)
        silent = os.environ.get("RANK", "0") != "0"  # under torchrun only the first process reports
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            disable=silent or not self._console.is_terminal,
            speed_estimate_period=120,
        )
        self._disabled = silent
        self._task = self._progress.add_task(title, total=steps, loss="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, step: int, figures: Mapping[str, Any]) -> None:
        """Update the bar; print held-out metrics and warnings as lines."""
        loss = f"loss {figures['loss']:.4f}" if "loss" in figures else None
        self._progress.update(self._task, completed=step)
        if loss is not None:
            self._progress.update(self._task, loss=loss)
        if self._disabled:
            return
        if "warning" in figures:
            self._console.print(f"step {step}: warning: {figures['warning']}", style="yellow")
        if loss is None or not self._console.is_terminal:
            shown = " ".join(
                f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, (int, float))
            )
            self._console.print(f"step {step}: {shown}")
