"""Predictor of the reference: DataFrames in, the mean of the sampled paths out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from kronos_stream.channels import CHANNELS
from kronos_stream.compat.frames import prepare_frame
from kronos_stream.engine.context import PreparedContext
from kronos_stream.engine.device import pick_device
from kronos_stream.engine.forecaster import Forecaster
from kronos_stream.engine.noise import noise_key, uniforms
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.uncached import generate
from kronos_stream.model.config import check_matching_bits
from kronos_stream.model.inputs import denormalise
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer

_ROWS_AT_ONCE = 64
"""Windows recomputed together beyond max_context: enough for a CPU, with little memory."""


class KronosPredictor:
    """Forecasts from DataFrames: the mean of ``sample_count`` paths, as in the reference.

    model, tokenizer: networks with equal token sizes (else ValueError). Both are moved to
        ``device`` once, in place; later changes of their weights take effect.
    device: a torch device; None is CUDA, else MPS, else the CPU. ValueError if not available.
    max_context: bars of the model's window.
    clip: bound of the normalised values, in standard deviations.
    """

    def __init__(
        self,
        model: Predictor,
        tokenizer: Tokenizer,
        device: str | torch.device | None = None,
        max_context: int = 512,
        clip: float = 5,
    ) -> None:
        check_matching_bits(model.config, tokenizer.config)
        self.device = pick_device("auto" if device is None else str(device))
        self.model = model.to(self.device)
        self.tokenizer = tokenizer.to(self.device)
        self.max_context = max_context
        self.clip = clip
        self._forecaster: Forecaster | None = None
        self._folded: list[tuple[int, int, float]] = []

    def predict(
        self,
        df: pd.DataFrame,
        x_timestamp: Any,
        y_timestamp: Any,
        pred_len: int,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        use_kv_cache: bool = True,
    ) -> pd.DataFrame:
        """Continue one series by ``pred_len`` bars.

        df: (L, >= 4) open, high, low, close and optionally volume and amount, oldest first, in any
            units.
        x_timestamp: (L,) opens of its bars; y_timestamp: (pred_len,) of the future bars. The
            model uses their wall clock.
        T, top_k, top_p: temperature and filters; top_k > 0 disables top_p, as in the reference.
        sample_count: number of paths whose mean is returned.
        verbose: show a progress bar.
        use_kv_cache: ignored; the engine always caches where that is exact.

        Returns a DataFrame (pred_len, 6) of float32 in the units of ``df``, indexed by
        ``y_timestamp``. Beyond ``max_context`` the window slides and each step recomputes it, with
        a UserWarning.

        Raises ValueError for an invalid frame, times that do not match it, and options out of
        range, including a ``pred_len`` above ``max_context``, since the tokenizer decodes a single
        window; TypeError for a count that is not an integer.
        """
        del use_kv_cache
        series = [(df, x_timestamp, y_timestamp)]
        return self._predict(series, pred_len, T, top_k, top_p, sample_count, verbose)[0]

    def predict_batch(
        self,
        df_list: Sequence[pd.DataFrame],
        x_timestamp_list: Sequence[Any],
        y_timestamp_list: Sequence[Any],
        pred_len: int,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        use_kv_cache: bool = True,
    ) -> list[pd.DataFrame]:
        """Continue several series at once; their lengths may differ (the reference's may not).

        Arguments, results and errors are those of :meth:`predict`, a list of each; ValueError
        also for lists of unequal length.
        """
        del use_kv_cache
        if not len(df_list) == len(x_timestamp_list) == len(y_timestamp_list):
            raise ValueError(
                "df_list, x_timestamp_list and y_timestamp_list must have one length, not "
                f"{len(df_list)}, {len(x_timestamp_list)} and {len(y_timestamp_list)}"
            )
        series = list(zip(df_list, x_timestamp_list, y_timestamp_list, strict=True))
        return self._predict(series, pred_len, T, top_k, top_p, sample_count, verbose)

    def _predict(
        self,
        series: Sequence[tuple[pd.DataFrame, Any, Any]],
        pred_len: int,
        temperature: float,
        top_k: int,
        top_p: float,
        sample_count: int,
        verbose: bool,
    ) -> list[pd.DataFrame]:
        pred_len, sample_count = index(pred_len), index(sample_count)
        if not 1 <= pred_len <= self.max_context:
            raise ValueError(
                f"pred_len {pred_len}: expected 1 to max_context {self.max_context}, since the "
                "tokenizer decodes a single window"
            )
        if sample_count < 1:
            raise ValueError(f"sample_count {sample_count}: must be at least 1")
        prepared = [prepare_frame(i, *item, pred_len, self.clip) for i, item in enumerate(series)]
        sampling = Sampling(temperature, top_k, 1.0 if top_k > 0 else top_p)
        seed = int(torch.randint(2**62, ()).item())
        means: dict[int, NDArray[np.float32]] = {}
        with Progress(disable=not verbose, transient=True) as bar:
            task = bar.add_task("forecasting", total=len(prepared))
            fitting = [i for i, p in enumerate(prepared) if p.length + pred_len <= self.max_context]
            if fitting:
                draws = self._engine().draw_prepared(
                    [prepared[i] for i in fitting], sample_count, sampling, seed=seed
                )
                means |= {i: d.paths.mean(axis=0) for i, d in zip(fitting, draws, strict=True)}
                bar.advance(task, len(fitting))
            for i, item in enumerate(prepared):
                if i not in means:
                    means[i] = self._recompute(item, sample_count, sampling, seed)
                    bar.advance(task)
        return [
            pd.DataFrame(means[i], columns=list(CHANNELS), index=y_timestamp)
            for i, (_, _, y_timestamp) in enumerate(series)
        ]

    def _engine(self) -> Forecaster:
        """Return the folded weights; fold again after the modules' parameters have changed."""
        state = _parameter_fingerprint(self.model) + _parameter_fingerprint(self.tokenizer)
        if self._forecaster is None or state != self._folded:
            if self._forecaster is not None:
                # Free its memory first: the new one sets its budget by the device's free memory.
                self._forecaster = None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            self._forecaster = Forecaster(
                self.model,
                self.tokenizer,
                device=str(self.device),
                dtype="float32",
                max_context=self.max_context,
            )
            self._folded = state
        return self._forecaster

    def _recompute(
        self, item: PreparedContext, paths: int, sampling: Sampling, seed: int
    ) -> NDArray[np.float32]:
        """Return the mean path (H, 6) beyond max_context, where the window slides."""
        warnings.warn(
            f"{item.length} bars and a horizon of {item.horizon} exceed max_context "
            f"{self.max_context}: every step recomputes its window, which is exact but slow",
            UserWarning,
            stacklevel=4,
        )
        normalised = torch.from_numpy(item.normalised)[None].to(self.device)
        stamps = torch.from_numpy(item.stamps)[None].to(self.device)
        key = torch.tensor([noise_key(seed, item.name, item.origin)], device=self.device)
        total = np.zeros((item.horizon, len(CHANNELS)), np.float64)
        with (
            _eval_mode(self.model, self.tokenizer),
            torch.autocast(self.device.type, enabled=False),
        ):
            for first in range(0, paths, _ROWS_AT_ONCE):
                count = min(_ROWS_AT_ONCE, paths - first)
                candles, _ = generate(
                    self.model,
                    self.tokenizer,
                    normalised,
                    stamps,
                    uniforms(key, first, count, item.horizon),
                    max_context=self.max_context,
                    sampling=sampling,
                )
                total += candles[0].sum(0).cpu().numpy()
        return denormalise((total / paths).astype(np.float32), item.mean, item.std)


@contextmanager
def _eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Switch to eval mode and restore the mode of each module afterwards."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _parameter_fingerprint(module: nn.Module) -> list[tuple[int, int, float]]:
    """Return a value per parameter that changes when the parameter changes."""
    parameters = [p.detach() for p in module.parameters()]
    # Fused optimisers and edits of ``.data`` do not change the version, but they change the sum.
    sums = torch.stack([p.sum(dtype=torch.float32) for p in parameters]).tolist()
    return [
        # Tensors made in inference mode have no version. Torch has no public name for it.
        (p.data_ptr(), 0 if p.is_inference() else p._version, total)  # noqa: SLF001
        for p, total in zip(parameters, sums, strict=True)
    ]
