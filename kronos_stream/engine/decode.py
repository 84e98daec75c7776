"""Decode loop: one bar per step for every path of a chunk, computing only the newest rows.

A :class:`Decoder` owns every buffer of the loop, so the loop allocates nothing that outlives a
step, never waits for the host, and can be captured into one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kronos_stream.engine.blocks import LayerCache, PathRows, attend_all, rms_norm, run_rows
from kronos_stream.engine.dense import Scratch
from kronos_stream.engine.noise import uniforms
from kronos_stream.engine.plan import Shape
from kronos_stream.engine.prefix import ContextPrefix
from kronos_stream.engine.sampling import Sampling, draw
from kronos_stream.engine.weights import PredictorWeights, TokenizerWeights
from kronos_stream.model.config import S2_HEADS


@dataclass(frozen=True, slots=True)
class Group:
    """Contexts of one shape: their prefixes, and their paths' rows and suffixes."""

    shape: Shape
    contexts: slice
    rows: slice
    prefix: ContextPrefix
    trunk: LayerCache  # (layers, rows, heads, horizon, head_dim)
    s2: LayerCache  # (1, rows, S2_HEADS, horizon, head_dim)


class Decoder:
    """Buffers and loop for one chunk's shapes; reusable for any chunk of the same shapes."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        predictor: PredictorWeights,
        tokenizer: TokenizerWeights,
        sampling: Sampling,
    ) -> None:
        """shapes: longest horizon first, so that the active rows of a step are always the first."""
        self.weights = predictor
        self.sampling = sampling
        self.horizon = shapes[0].horizon
        like = predictor.s2_query
        self.device = like.device
        self.groups: list[Group] = []
        contexts = rows = 0
        for shape in shapes:
            size = shape.contexts * shape.paths
            self.groups.append(
                Group(
                    shape,
                    slice(contexts, contexts + shape.contexts),
                    slice(rows, rows + size),
                    ContextPrefix.empty(shape, predictor, tokenizer),
                    *_suffixes(predictor, size, shape.horizon),
                )
            )
            contexts, rows = contexts + shape.contexts, rows + size
        self._contexts = contexts
        self._scratch = Scratch(like.device)
        padded = self._padded(rows)
        self._row_context = torch.zeros(padded, dtype=torch.long, device=self.device)
        for group in self.groups:
            own = torch.arange(group.contexts.start, group.contexts.stop, device=self.device)
            self._row_context[group.rows] = own.repeat_interleave(group.shape.paths)
        self._uniforms = torch.full((self.horizon, 2, padded), 0.5, device=self.device)
        self._tokens = self._row_context.new_zeros(padded, self.horizon, 2)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warmed_up = False

    def run(self, keys: Tensor, first_path: int) -> list[Tensor]:
        """Draw every group's paths from its filled prefix.

        keys: (contexts, 4) noise keys. Returns the tokens (B, P, horizon, 2) of each group, valid
        until the next run.
        """
        for group in self.groups:
            noise = uniforms(
                keys[group.contexts], first_path, group.shape.paths, group.shape.horizon
            )
            self._uniforms[: group.shape.horizon, :, group.rows] = noise.flatten(2)
        if self.device.type == "cuda" and self._warmed_up:
            self._replay()
        else:
            self._loop()
        self._warmed_up = True
        return [
            self._tokens[g.rows, : g.shape.horizon].unflatten(0, (g.shape.contexts, g.shape.paths))
            for g in self.groups
        ]

    def _replay(self) -> None:
        # The first run is eager: it initialises the libraries, and a capture does not pay off for
        # a shape that is used once.
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # Torch captures the current device. If that is another one, the graph would be empty
            # and a replay would return the tokens of the previous call.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, stream=_stream(self.device)),
            ):
                self._loop()
            self._graph = graph
        self._graph.replay()

    def _loop(self) -> None:
        w = self.weights
        lengths = torch.cat([g.prefix.lengths for g in self.groups])
        origin = torch.cat([g.prefix.hidden for g in self.groups])
        origin = torch.nn.functional.pad(
            origin, (0, 0, 0, self._padded(self._contexts) - self._contexts)
        )
        # Before the first bar all paths of a context share one state.
        hidden = origin[self._row_context]
        s1 = self._draw(w.s1_head(origin)[self._row_context], 0, level=0)
        s2 = self._draw_s2(hidden, s1, self._path_rows(0, s2=True), 0)
        for step in range(1, self.horizon):
            active = [g for g in self.groups if g.shape.horizon > step]
            rows = self._padded(active[-1].rows.stop)
            time = torch.cat([g.prefix.time_embedding[step - 1] for g in active])
            # A padded row may belong to a context beyond the active ones, with a shorter horizon.
            context = self._row_context[:rows].clamp(max=len(time) - 1)
            x = w.s1_table[s1[:rows]] + w.s2_table[s2[:rows]] + time[context]
            rotation = w.stack.rotation[lengths[context] + (step - 1)][:, None, None]
            run_rows(w.stack, x, rotation, self._path_rows(step), step - 1, self._scratch)
            hidden = rms_norm(x, w.norm, torch.float32)
            groups = self._path_rows(step, s2=True)
            pair = w.s2_key_value(hidden.to(w.s2_query.dtype))
            keys, values = pair.view(rows, 2, S2_HEADS, -1).unbind(1)
            for group in groups:
                group.write(0, step - 1, keys, values)
            s1 = self._draw(w.s1_head(hidden), step, level=0)
            s2 = self._draw_s2(hidden, s1, groups, step)

    def _draw_s2(self, hidden: Tensor, s1: Tensor, groups: Sequence[PathRows], step: int) -> Tensor:
        """Draw s2 given s1 (R,), the trunk's states (R, d) and the own bars before ``step``."""
        w = self.weights
        query = w.s2_query[s1].unflatten(-1, (S2_HEADS, -1))
        mixed = attend_all(groups, 0, step, query, self._scratch)
        total = hidden.clone()
        w.s2_out.multiply_add(mixed, total)
        s2 = self._draw(w.s2_head(rms_norm(total, w.s2_norm, torch.float32)), step, level=1)
        rows = len(s1)
        self._tokens[:rows, step, 0] = s1
        self._tokens[:rows, step, 1] = s2
        return s2

    def _draw(self, logits: Tensor, step: int, level: int) -> Tensor:
        return draw(logits, self._uniforms[step, level, : len(logits)], self.sampling, step)

    def _path_rows(self, step: int, *, s2: bool = False) -> list[PathRows]:
        # On an accelerator the bias is always applied, so a captured graph serves all lengths.
        needs_bias = self.device.type != "cpu"
        return [
            PathRows(
                rows=g.rows,
                shape=(g.shape.contexts, g.shape.paths, 1),
                prefix=g.prefix.s2 if s2 else g.prefix.trunk,
                mask=g.prefix.bias if needs_bias or not g.prefix.full else None,
                suffix=g.s2 if s2 else g.trunk,
            )
            for g in self.groups
            if g.shape.horizon > step
        ]

    def _padded(self, rows: int) -> int:
        return max(rows, self.weights.min_rows)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the capture stream of a device; one stream, because each has its own workspace."""
    return torch.cuda.Stream(device)


def _suffixes(w: PredictorWeights, rows: int, horizon: int) -> tuple[LayerCache, LayerCache]:
    """Suffix caches of the trunk and of the s2 layer."""

    def cache(layers: int, heads: int) -> LayerCache:
        shape = (layers, rows, heads, horizon, w.stack.width // heads)
        return LayerCache(w.s2_query.new_empty(shape), w.s2_query.new_empty(shape))

    return cache(len(w.stack.blocks), w.stack.heads), cache(1, S2_HEADS)
