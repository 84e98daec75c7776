"""Forecaster: the public interface of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from operator import index
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from kronos_stream.engine.context import (
    Context,
    ContextError,
    PreparedContext,
    context_name,
    prepare_all,
)
from kronos_stream.engine.device import free_memory, pick_device, pick_dtype
from kronos_stream.engine.noise import noise_key
from kronos_stream.engine.plan import MemorySizes, Planner
from kronos_stream.engine.prefix import Stage
from kronos_stream.engine.runner import ACCELERATOR_TUNING, CPU_TUNING, Runner, SampledPaths
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.weights import fold_predictor, fold_tokenizer
from kronos_stream.model.checkpoint import ModelLocation, find_model, load_predictor, load_tokenizer
from kronos_stream.model.config import check_matching_bits
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer

DEFAULT_CONTEXT = 512
"""Window in bars on which the published small, base and large models were trained."""


class Forecaster:
    """Samples future candles from Kronos. Not thread-safe: one call at a time."""

    def __init__(
        self,
        predictor: Predictor,
        tokenizer: Tokenizer,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_context: int = DEFAULT_CONTEXT,
        memory_budget: int | None = None,
    ) -> None:
        """Fold the weights of two loaded models for inference.

        device: "auto" (CUDA, MPS, CPU), or a torch device. dtype: "float32", "bfloat16" or "auto"
        (bfloat16 if the hardware multiplies it natively); the tokenizer's encoder is always
        float32. memory_budget: bytes for caches, without the weights; larger calls are split.
        Raises ValueError if the two models have different token sizes.
        """
        check_matching_bits(predictor.config, tokenizer.config)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.max_context = max_context
        self.checkpoint: ModelLocation | None = None
        """Checkpoint loaded by :meth:`from_pretrained`, else None."""
        self.on_stage: Callable[[Stage], None] | None = None
        """Called with each stage as it begins; for measurements."""
        tuning = CPU_TUNING if self.device.type == "cpu" else ACCELERATOR_TUNING
        positions = max_context + tuning.bucket
        with _default_torch_settings():
            self._runner = Runner(
                fold_predictor(predictor, self.device, self.dtype, positions),
                fold_tokenizer(tokenizer, self.device, self.dtype, positions),
                Planner(
                    sizes=MemorySizes.for_model(
                        predictor.config, tokenizer.config, self.dtype, max_context
                    ),
                    bucket=tuning.bucket,
                    budget=free_memory(self.device) if memory_budget is None else memory_budget,
                    pad_contexts=self.device.type == "cuda",
                ),
                tuning,
                self.device,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
        *,
        tokenizer_revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_context: int | None = None,
        memory_budget: int | None = None,
    ) -> Self:
        """Load from a hub id, a folder, or the name of a bundled checkpoint ("nano").

        tokenizer: required if ``model`` is the folder of a predictor without a tokenizer.
        max_context: by default the window on which the checkpoint was trained.

        Raises CheckpointError.
        """
        found = find_model(model, tokenizer, revision, tokenizer_revision)
        forecaster = cls(
            load_predictor(found.predictor.name, found.predictor.revision),
            load_tokenizer(found.tokenizer.name, found.tokenizer.revision),
            device=device,
            dtype=dtype,
            max_context=max_context or found.max_context or DEFAULT_CONTEXT,
            memory_budget=memory_budget,
        )
        forecaster.checkpoint = found
        return forecaster

    def sample(
        self,
        contexts: Sequence[Context],
        horizon: int | Sequence[int],
        paths: int = 32,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        anchor: bool = False,
        first_path: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Sample paths of every context: (paths, horizon, 6) float32 in price units for each.

        horizon: number of bars, one for all contexts or one per context.
        temperature: one number, or one per horizon step (the last one applies to later steps).
        top_k, top_p: both apply, top_k first; top_k=1 is greedy.
        seed: determines the noise together with the series and the origin; other contexts of the
            call have no influence.
        anchor: scale the prices of each path by actual / decoded close of the origin bar, which
            removes the tokenizer's rounding at the origin.
        first_path: number of the first path; paths sampled in blocks equal those of one call.
        progress: called with (sampled, total) paths.

        Raises ContextError for an invalid context, ValueError for an option out of range, TypeError
        for a count that is not an integer.
        """
        draws = self.draw(
            contexts,
            horizon,
            paths,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            anchor=anchor,
            first_path=first_path,
            progress=progress,
        )
        return [draw.paths for draw in draws]

    def draw(
        self,
        contexts: Sequence[Context],
        horizon: int | Sequence[int],
        paths: int = 32,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        anchor: bool = False,
        first_path: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[SampledPaths]:
        """Sample like :meth:`sample`; also return the tokens and times of the sampled bars."""
        paths, first_path, top_k = index(paths), index(first_path), index(top_k)
        if paths < 1 or first_path < 0:
            raise ValueError(f"paths {paths}, first_path {first_path}: must be at least 1 and 0")
        if isinstance(temperature, (int, float, np.number)):
            temperature = float(temperature)
        else:
            temperature = tuple(float(t) for t in temperature)
        sampling = Sampling(temperature, top_k, float(top_p))
        return self.draw_prepared(
            self._prepare(contexts, horizon),
            paths,
            sampling,
            seed=seed,
            anchor=anchor,
            first_path=first_path,
            progress=progress,
        )

    def draw_prepared(
        self,
        prepared: Sequence[PreparedContext],
        paths: int,
        sampling: Sampling,
        *,
        seed: int,
        anchor: bool = False,
        first_path: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[SampledPaths]:
        """Sample like :meth:`draw`, from prepared contexts that fit the window."""
        draws: dict[int, SampledPaths] = {}
        with _default_torch_settings():
            keys = torch.tensor(
                [noise_key(seed, item.name, item.origin) for item in prepared], dtype=torch.long
            ).view(-1, 4)
            for drawn in self._runner.run(
                prepared,
                keys,
                paths,
                sampling,
                first_path,
                anchor=anchor,
                on_stage=self.on_stage or _ignore,
            ):
                draws |= drawn
                if progress is not None:
                    progress(paths * len(draws), paths * len(prepared))
        return [draws[i] for i in range(len(prepared))]

    def _prepare(
        self, contexts: Sequence[Context], horizon: int | Sequence[int]
    ) -> list[PreparedContext]:
        if isinstance(horizon, (int, np.integer)):
            horizons = [index(horizon)] * len(contexts)
        else:
            horizons = [index(h) for h in horizon]
        if len(horizons) != len(contexts):
            raise ValueError(f"{len(horizons)} horizons for {len(contexts)} contexts")
        if any(h < 1 for h in horizons):
            raise ValueError(f"horizon {min(horizons)}: must be at least 1 bar")
        for i, (context, bars) in enumerate(zip(contexts, horizons, strict=True)):
            length = len(context.times) if isinstance(context.times, Sized) else 0
            if length + bars > self.max_context:
                room = self.max_context - bars
                raise ContextError(
                    f"{context_name(context, i)}: {length} bars and a horizon of {bars} exceed "
                    f"max_context {self.max_context}; "
                    + (f"give at most {room} bars" if room > 1 else "shorten the horizon")
                )
        return prepare_all(contexts, horizons)


@contextmanager
def _default_torch_settings() -> Iterator[None]:
    """Disable gradients and override torch defaults that the caller may have changed."""
    dtype = torch.get_default_dtype()
    # A device context costs microseconds per operation, so enter it only if necessary.
    elsewhere = torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(),
            torch.device("cpu") if elsewhere else nullcontext(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _ignore(_: Stage) -> None:
    pass
