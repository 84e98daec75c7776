"""Run folder: resumable state, metrics and the exported checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from kronos_stream.model import Predictor, Tokenizer, save
from kronos_stream.training.errors import TrainingError

STATE_FILE = "state.pt"
METRICS_FILE = "metrics.jsonl"
SETTINGS_FILE = "settings.json"


class RunFolder:
    """Files of one run. All files except the metrics are replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.path}: {error.strerror or error}") from None

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Return the newest state, or None for a new run."""
        path = self.path / STATE_FILE
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # unpickling, zip and I/O errors of several kinds
            raise TrainingError(
                f"{path}: not a readable training state ({type(error).__name__}); "
                "remove it to start over"
            ) from error
        return state

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace the state atomically, so that a kill leaves the old or the new one."""
        path = self.path / STATE_FILE
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings of the run, for information only."""
        part = self.path / f"{SETTINGS_FILE}.part"
        part.write_text(json.dumps(settings, indent=2) + "\n")
        part.replace(self.path / SETTINGS_FILE)

    def export(self, network: Tokenizer | Predictor, *, half: bool) -> None:
        """Write the checkpoint in the published layout."""
        if half:
            copy = type(network)(network.config)  # type: ignore[arg-type]
            copy.load_state_dict(network.state_dict())
            for (
                parameter
            ) in copy.parameters():  # without the buffers: rotation angles must be exact
                parameter.data = parameter.data.half()
            network = copy
        save(network, self.path)

    def rewind_metrics(self, step: int) -> None:
        """Drop metrics of steps that will be repeated, and an incomplete last line."""
        path = self.path / METRICS_FILE
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        part = path.with_suffix(".part")
        part.write_text("".join(kept))
        part.replace(path)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line of metrics."""
        with (self.path / METRICS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
