"""Execution of a planned call, chunk by chunk: prefix, decoding, detokenisation."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kronos_stream.channels import CLOSE, PRICES
from kronos_stream.engine.context import PreparedContext
from kronos_stream.engine.decode import Decoder, Group
from kronos_stream.engine.dense import Scratch
from kronos_stream.engine.detokenise import detokenise
from kronos_stream.engine.plan import Chunk, Planner, Shape
from kronos_stream.engine.prefix import Stage
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.weights import PredictorWeights, TokenizerWeights
from kronos_stream.model.inputs import denormalise

MAX_ANCHOR_RATIO = 2.0
"""Beyond this factor the decoded close is not comparable, and no anchor is applied."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes tuned to a kind of device; they change results at most by rounding.

    bucket: contexts are padded to a multiple of this many bars.
    prefix_rows: bars prefilled together (at least one context).
    decode_rows: bars detokenised together.
    cached_decoders: maximum number of chunk shapes whose buffers are kept for later calls.
    """

    bucket: int
    prefix_rows: int
    decode_rows: int
    cached_decoders: int


# CPU: enough rows to outweigh the call overhead, few enough to stay in a core's cache.
CPU_TUNING = Tuning(bucket=8, prefix_rows=512, decode_rows=1024, cached_decoders=4)
# Accelerators: each cached decoder saves a graph capture; the budget limits their memory.
ACCELERATOR_TUNING = Tuning(bucket=64, prefix_rows=16384, decode_rows=65536, cached_decoders=32)


@dataclass(frozen=True, slots=True, eq=False)
class SampledPaths:
    """Sampled paths of one context."""

    paths: NDArray[np.float32]  # (P, H, 6), price units
    tokens: NDArray[np.int64]  # (P, H, 2): s1, s2
    times: NDArray[np.int64]  # (H,) UTC ms of the bars' opens


class Runner:
    """Executes calls with folded weights and reuses buffers for recurring shapes."""

    def __init__(
        self,
        predictor: PredictorWeights,
        tokenizer: TokenizerWeights,
        planner: Planner,
        tuning: Tuning,
        device: torch.device,
    ) -> None:
        self.planner = planner
        self.decoders: OrderedDict[tuple[tuple[Shape, ...], Sampling], Decoder] = OrderedDict()
        self._predictor = predictor
        self._tokenizer = tokenizer
        self._tuning = tuning
        self._device = device
        self._scratch = Scratch(device)

    def run(
        self,
        prepared: Sequence[PreparedContext],
        keys: torch.Tensor,
        paths: int,
        sampling: Sampling,
        first_path: int,
        *,
        anchor: bool,
        on_stage: Callable[[Stage], None],
    ) -> Iterator[dict[int, SampledPaths]]:
        """Yield the sampled paths of each chunk when done, by the context's index in ``prepared``.

        keys: (contexts, 4) noise keys, on the CPU.
        """
        for chunk in self.planner.chunks(prepared, paths):
            key = chunk.shapes, sampling
            decoder = self._decoder_for(key)
            self._fill(decoder, chunk, prepared, on_stage)
            chunk_keys = self._keys(decoder, chunk, keys)
            candles: defaultdict[int, list[NDArray[np.float32]]] = defaultdict(list)
            tokens: defaultdict[int, list[NDArray[np.int64]]] = defaultdict(list)
            for piece in range(chunk.slices):
                on_stage("decode")
                drawn = decoder.run(chunk_keys, first_path + piece * chunk.shapes[0].paths)
                on_stage("detokenise")
                for group, members, own in zip(decoder.groups, chunk.members, drawn, strict=True):
                    own_tokens = own[: len(members)].cpu().numpy().copy()
                    contexts = [prepared[i] for i in members]
                    own_candles = self._candles(group, own, contexts, anchor=anchor)
                    for slot, i in enumerate(members):
                        candles[i].append(own_candles[slot])
                        tokens[i].append(own_tokens[slot])
            on_stage("done")
            # Kept only now: after a failure, such as out of memory, the decoder is discarded.
            self.decoders[key] = decoder
            yield {
                i: SampledPaths(
                    paths=np.concatenate(candles[i])[:paths],
                    tokens=np.concatenate(tokens[i])[:paths],
                    times=prepared[i].future_times,
                )
                for i in candles
            }

    def _decoder_for(self, key: tuple[tuple[Shape, ...], Sampling]) -> Decoder:
        """Return the kept decoder of these shapes, which recur at every bar close, or a new one."""
        shapes, sampling = key
        decoder = self.decoders.pop(key, None)
        if decoder is not None:
            return decoder
        room = self.planner.budget - self.planner.cost(shapes)
        while self.decoders and (
            len(self.decoders) >= self._tuning.cached_decoders
            or sum(self.planner.cost(cached) for cached, _ in self.decoders) > room
        ):
            self.decoders.popitem(last=False)
        return Decoder(shapes, self._predictor, self._tokenizer, sampling)

    def _fill(
        self,
        decoder: Decoder,
        chunk: Chunk,
        prepared: Sequence[PreparedContext],
        on_stage: Callable[[Stage], None],
    ) -> None:
        for group, members in zip(decoder.groups, chunk.members, strict=True):
            group.prefix.fill(
                [prepared[i] for i in members],
                self._predictor,
                self._tokenizer,
                max(1, self._tuning.prefix_rows // group.shape.bars),
                self._scratch,
                on_stage,
            )

    def _keys(self, decoder: Decoder, chunk: Chunk, keys: torch.Tensor) -> torch.Tensor:
        """Return the noise keys in the decoder's order, 0 for slots without a context."""
        ordered = []
        for group, members in zip(decoder.groups, chunk.members, strict=True):
            padding = torch.zeros(group.shape.contexts - len(members), 4, dtype=torch.long)
            ordered.append(torch.cat((keys[list(members)], padding)))
        return torch.cat(ordered).to(self._device)

    def _candles(
        self,
        group: Group,
        tokens: torch.Tensor,
        members: Sequence[PreparedContext],
        *,
        anchor: bool,
    ) -> list[NDArray[np.float32]]:
        """Convert tokens (B, P, H, 2) to candles in price units, (P, H, 6) for each member."""
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
                values[..., PRICES] *= _anchor_ratio(item, close)
            candles.append(values)
        return candles


def _anchor_ratio(item: PreparedContext, origin_close: np.float32) -> np.float32:
    """Return actual / decoded close of the origin bar; 1 beyond MAX_ANCHOR_RATIO."""
    row = np.full(len(item.mean), origin_close)  # only the close is used
    decoded = float(denormalise(row, item.mean, item.std)[CLOSE])
    ratio = item.last_close / decoded if decoded else 0.0
    return np.float32(ratio if 1 / MAX_ANCHOR_RATIO <= ratio <= MAX_ANCHOR_RATIO else 1.0)
