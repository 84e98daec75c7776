"""The Forecaster: contexts in, sample paths out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from kronos_stream.engine.context import Context, ContextError, Prepared, denormalise, prepare
from kronos_stream.engine.decode import Decoder, Group
from kronos_stream.engine.dense import Scratch
from kronos_stream.engine.detokenise import detokenise
from kronos_stream.engine.device import pick_device, pick_dtype
from kronos_stream.engine.noise import noise_key
from kronos_stream.engine.plan import Chunk, Planner, Shape, Sizes
from kronos_stream.engine.prefix import CLOSE, Stage
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.weights import fold_predictor, fold_tokenizer
from kronos_stream.model.checkpoint import find, load_predictor, load_tokenizer
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer

DEFAULT_CONTEXT = 512
"""Bars the published small, base and large models were trained on."""

PRICES = slice(0, 4)

_CPU_BUDGET = 2 * 2**30
_ACCELERATOR_SHARE = 0.6
_KEPT_DECODERS = 4


@dataclass(frozen=True, slots=True)
class Tuning:
    """Shapes that suit a kind of device; results depend on them by rounding at most.

    bucket: contexts are padded to a multiple of this many bars.
    prefix_rows: bars prefilled together (at least one context).
    decode_rows: bars detokenised together.
    """

    bucket: int
    prefix_rows: int
    decode_rows: int


# On the CPU one context at a time: its rows fill the cores and stay in their cache.
_CPU_TUNING = Tuning(bucket=8, prefix_rows=1, decode_rows=1024)
_ACCELERATOR_TUNING = Tuning(bucket=64, prefix_rows=16384, decode_rows=65536)


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What was drawn for one context."""

    paths: NDArray[np.float32]  # (P, H, 6), price units
    tokens: NDArray[np.int64]  # (P, H, 2): s1, s2
    times: NDArray[np.int64]  # (H,) UTC ms of the bars' opens


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
        (bfloat16 where the hardware multiplies it natively); the tokenizer's encoder is always
        float32. memory_budget: bytes for caches beside the weights; larger calls are split.
        """
        bits = (predictor.config.s1_bits, predictor.config.s2_bits)
        if bits != (tokenizer.config.s1_bits, tokenizer.config.s2_bits):
            raise ValueError(
                f"this predictor speaks {bits[0]}+{bits[1]} bits, this tokenizer "
                f"{tokenizer.config.s1_bits}+{tokenizer.config.s2_bits}: they do not belong "
                "together"
            )
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.max_context = max_context
        self._tuning = _CPU_TUNING if self.device.type == "cpu" else _ACCELERATOR_TUNING
        positions = max_context + self._tuning.bucket
        self._predictor = fold_predictor(predictor, self.device, self.dtype, positions)
        self._tokenizer = fold_tokenizer(tokenizer, self.device, self.dtype, positions)
        self._planner = Planner(
            sizes=_sizes(predictor, tokenizer, self.dtype, max_context),
            bucket=self._tuning.bucket,
            budget=memory_budget or _budget(self.device),
            pad_contexts=self.device.type == "cuda",
        )
        self.on_stage: Callable[[Stage], None] = lambda _: None
        """Told which stage of the work begins; for measuring."""
        self._scratch = Scratch(self.device)
        self._decoders: OrderedDict[tuple[tuple[Shape, ...], Sampling], Decoder] = OrderedDict()

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

        tokenizer: needed for a predictor's folder alone; published predictors know theirs.
        max_context: by default what the checkpoint was trained on. Raises CheckpointError.
        """
        found = find(model, tokenizer)
        return cls(
            load_predictor(found.predictor, revision),
            load_tokenizer(found.tokenizer, tokenizer_revision),
            device=device,
            dtype=dtype,
            max_context=max_context or found.max_context or DEFAULT_CONTEXT,
            memory_budget=memory_budget,
        )

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
        """Every sample path of every context: (paths, horizon, 6) float32 in price units each.

        horizon: bars to draw, one number or one per context.
        temperature: one number, or one per horizon step (the last holds for later steps).
        top_k, top_p: both apply, k first; top_k=1 is greedy.
        seed: with the series and the origin it fixes the noise, whatever else is in the call.
        anchor: scale each path's prices by actual / decoded close of the origin bar, which takes
            the tokenizer's rounding at the origin out.
        first_path: number of the first path; blocks of paths join to what one call gives.
        progress: told (drawn, all) in paths.

        Raises ContextError for a bad context, ValueError for a bad option, TypeError for a count
        that is no whole number.
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
    ) -> list[Draw]:
        """Like :meth:`sample`, with the tokens and the times of the drawn bars."""
        paths, first_path, top_k = index(paths), index(first_path), index(top_k)
        if paths < 1 or first_path < 0:
            raise ValueError(f"paths {paths} from {first_path}: at least one, from 0 up")
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

    @torch.inference_mode()
    def draw_prepared(
        self,
        prepared: Sequence[Prepared],
        paths: int,
        sampling: Sampling,
        *,
        seed: int,
        anchor: bool = False,
        first_path: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Draw]:
        """:meth:`draw` for contexts that are in the model's units already, and fit its window."""
        keys = torch.tensor(
            [noise_key(seed, item.name, item.origin) for item in prepared], dtype=torch.long
        ).view(-1, 4)
        draws: dict[int, Draw] = {}
        done = 0
        for chunk in self._planner.chunks(prepared, paths):
            drawn = self._draw_chunk(chunk, prepared, keys, sampling, first_path, anchor=anchor)
            for i, (candles, tokens) in drawn.items():
                draws[i] = Draw(candles[:paths], tokens[:paths], prepared[i].future_times)
                done += paths
            if progress is not None:
                progress(done, paths * len(prepared))
        return [draws[i] for i in range(len(prepared))]

    def _prepare(self, contexts: Sequence[Context], horizon: int | Sequence[int]) -> list[Prepared]:
        if isinstance(horizon, (int, np.integer)):
            horizons = [index(horizon)] * len(contexts)
        else:
            horizons = [index(h) for h in horizon]
        if len(horizons) != len(contexts):
            raise ValueError(f"{len(horizons)} horizons for {len(contexts)} contexts")
        if any(h < 1 for h in horizons):
            raise ValueError(f"horizon {min(horizons)}: at least one bar")
        prepared = [
            prepare(context, i, h)
            for i, (context, h) in enumerate(zip(contexts, horizons, strict=True))
        ]
        for i, item in enumerate(prepared):
            if item.length + item.horizon > self.max_context:
                name = f"context {i}" if contexts[i].series is None else item.name
                raise ContextError(
                    f"{name}: {item.length} bars and a horizon of {item.horizon} exceed "
                    f"max_context {self.max_context}; give at most "
                    f"{self.max_context - item.horizon} bars"
                )
        return prepared

    def _draw_chunk(
        self,
        chunk: Chunk,
        prepared: Sequence[Prepared],
        keys: torch.Tensor,
        sampling: Sampling,
        first_path: int,
        *,
        anchor: bool,
    ) -> dict[int, tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Price paths and tokens of a chunk's contexts, by their index in the call."""
        decoder = self._decoder(chunk.shapes, sampling)
        chunk_keys = []
        for group, members in zip(decoder.groups, chunk.members, strict=True):
            group.prefix.fill(
                [prepared[i] for i in members],
                self._predictor,
                self._tokenizer,
                max(1, self._tuning.prefix_rows // group.shape.bars),
                self._scratch,
                self.on_stage,
            )
            padding = torch.zeros(group.shape.contexts - len(members), 4, dtype=torch.long)
            chunk_keys.append(torch.cat((keys[list(members)], padding)))
        on_device = torch.cat(chunk_keys).to(self.device)
        parts: dict[int, list[tuple[NDArray[np.float32], NDArray[np.int64]]]] = {}
        for piece in range(chunk.slices):
            self.on_stage("decode")
            drawn = decoder.run(on_device, first_path + piece * chunk.shapes[0].paths)
            self.on_stage("detokenise")
            for group, members, tokens in zip(decoder.groups, chunk.members, drawn, strict=True):
                own_contexts = [prepared[i] for i in members]
                candles = self._candles(group, tokens, own_contexts, anchor=anchor)
                own = tokens[: len(members)].cpu().numpy()
                for slot, i in enumerate(members):
                    parts.setdefault(i, []).append((candles[slot], own[slot].copy()))
        self.on_stage("done")
        return {
            i: (np.concatenate([c for c, _ in own]), np.concatenate([t for _, t in own]))
            for i, own in parts.items()
        }

    def _candles(
        self, group: Group, tokens: torch.Tensor, members: Sequence[Prepared], *, anchor: bool
    ) -> list[NDArray[np.float32]]:
        """Tokens (B, P, H, 2) to price units, (P, H, 6) for each of the members."""
        normalised = detokenise(
            self._tokenizer,
            group.prefix,
            tokens[: len(members)],
            self._tuning.decode_rows,
            self._scratch,
        )
        origin_close = group.prefix.origin_close.cpu().numpy()
        candles = []
        for item, own, close in zip(members, normalised.cpu().numpy(), origin_close, strict=False):
            values = denormalise(own, item.mean, item.std)
            if anchor:
                decoded = float(denormalise(close, item.mean[CLOSE], item.std[CLOSE]))
                # A decoded close of no or the other sign gives no scale to correct by.
                if decoded * item.last_close > 0:
                    values[..., PRICES] *= np.float32(item.last_close / decoded)
            candles.append(values)
        return candles

    def _decoder(self, shapes: tuple[Shape, ...], sampling: Sampling) -> Decoder:
        """Buffers for these shapes: kept, because the same batch comes at every bar close."""
        key = (shapes, sampling)
        decoder = self._decoders.pop(key, None)
        if decoder is None:
            cost = self._planner.cost(shapes)
            while self._decoders and (
                len(self._decoders) >= _KEPT_DECODERS
                or cost + sum(self._planner.cost(s) for s, _ in self._decoders)
                > self._planner.budget
            ):
                self._decoders.popitem(last=False)
            decoder = Decoder(shapes, self._predictor, self._tokenizer, sampling)
        self._decoders[key] = decoder
        return decoder


def _sizes(predictor: Predictor, tokenizer: Tokenizer, dtype: torch.dtype, positions: int) -> Sizes:
    p, t, item = predictor.config, tokenizer.config, dtype.itemsize
    row = 2 * (p.n_layers + 1) * p.d_model * item
    attention = 3 * p.n_heads * positions * item
    logits = 6 * 2 ** max(p.s1_bits, p.s2_bits) * 4
    return Sizes(
        per_bar=row + 2 * (t.n_dec_layers - 1) * t.d_model * item,
        per_step=row,
        per_row=(6 * p.d_model + 2 * p.ff_dim) * item + attention + logits,
    )


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _ACCELERATOR_SHARE)
    return _CPU_BUDGET
