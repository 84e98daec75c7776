"""Planning: every context in one chunk, chunks within the budget, independent of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronos_stream import Context, Forecaster
from kronos_stream.engine.context import PreparedContext
from kronos_stream.engine.device import ACCELERATOR_SHARE
from kronos_stream.engine.plan import Chunk, MemorySizes, Planner
from kronos_stream.engine.runner import ACCELERATOR_TUNING
from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.config import PUBLISHED_PREDICTORS, PUBLISHED_TOKENIZER

SIZES = MemorySizes(per_bar=100, per_step=40, per_row=500)
GIB = 2**30
PADDING = 1.25
"""A group's context count is rounded up by less than a quarter."""


def prepared(length: int, horizon: int) -> PreparedContext:
    """A context of which only the sizes matter."""
    return PreparedContext(
        name="",
        normalised=np.zeros((length, 6), np.float32),
        mean=np.zeros(6, np.float32),
        std=np.ones(6, np.float32),
        stamps=np.zeros((length + horizon, 5), np.int64),
        future_times=np.zeros(horizon, np.int64),
        origin=0,
        last_close=1.0,
    )


def unpadded_cost(planner: Planner, chunk: Chunk) -> int:
    """Return the memory of the chunk's own contexts."""
    return planner.cost(
        [replace(s, contexts=len(m)) for s, m in zip(chunk.shapes, chunk.members, strict=True)]
    )


@given(
    sizes=st.lists(st.tuples(st.integers(2, 60), st.integers(1, 6)), max_size=60),
    paths=st.integers(1, 200),
    budget=st.integers(1_000, 400_000),
    bucket=st.sampled_from([1, 8, 64]),
    pad=st.booleans(),
)
def test_plans_cover_every_context_within_the_budget(
    sizes: list[tuple[int, int]], paths: int, budget: int, bucket: int, *, pad: bool
) -> None:
    """Each context occurs once, in a group of its shape, in chunks within the budget."""
    planner = Planner(SIZES, bucket, budget, pad)
    items = [prepared(*size) for size in sizes]
    chunks = planner.chunks(items, paths)
    seen = [i for chunk in chunks for members in chunk.members for i in members]
    assert sorted(seen) == list(range(len(items)))
    for chunk in chunks:
        members = [i for own in chunk.members for i in own]
        assert unpadded_cost(planner, chunk) <= budget or len(members) == 1
        assert planner.cost(chunk.shapes) <= PADDING * max(budget, unpadded_cost(planner, chunk))
        horizons = [shape.horizon for shape in chunk.shapes]
        assert horizons == sorted(horizons, reverse=True)
        for shape, own in zip(chunk.shapes, chunk.members, strict=True):
            assert len(own) <= shape.contexts
            assert pad or len(own) == shape.contexts
            for i in own:
                assert shape.horizon == items[i].horizon
                assert 0 <= shape.bars - items[i].length < bucket
                assert shape.bars % bucket == 0
            # Enough slices for all paths, and none without any.
            assert (chunk.slices - 1) * shape.paths < paths <= chunk.slices * shape.paths
        for i in members[:2]:
            (alone,) = planner.chunks([items[i]], paths)
            assert (alone.slices, alone.shapes[0].paths) == (chunk.slices, chunk.shapes[0].paths)


def test_few_shapes_recur() -> None:
    """With padding, counts are rounded up to one of a few, by less than a quarter."""
    planner = Planner(SIZES, 64, 10**12, pad_contexts=True)
    counts = set()
    for contexts in range(1, 81):
        (chunk,) = planner.chunks([prepared(30, 4)] * contexts, 8)
        count = chunk.shapes[0].contexts
        assert contexts <= count < PADDING * contexts
        counts.add(count)
    assert counts == {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80}


@pytest.fixture(scope="module")
def small_on_24_gb() -> Planner:
    """Kronos-small in bf16 on a 24 GB accelerator; sizes alone, no weights."""
    with torch.device("meta"):
        models = Predictor(PUBLISHED_PREDICTORS["small"]), Tokenizer(PUBLISHED_TOKENIZER)
    return Planner(
        MemorySizes.for_model(models[0].config, models[1].config, torch.bfloat16, 512),
        ACCELERATOR_TUNING.bucket,
        int(24 * GIB * ACCELERATOR_SHARE),
        pad_contexts=True,
    )


def test_a_thousand_contexts_are_chunked(small_on_24_gb: Planner) -> None:
    """1,000 symbols x 32 paths are more than the device holds, and still planned, in few parts."""
    chunks = small_on_24_gb.chunks([prepared(488, 24)] * 1000, 32)
    assert 2 <= len(chunks) <= 4
    assert all(chunk.slices == 1 for chunk in chunks)
    assert max(small_on_24_gb.cost(chunk.shapes) for chunk in chunks) < 24 * GIB * 0.75


def test_ten_thousand_paths_are_sliced(small_on_24_gb: Planner) -> None:
    """Ten thousand paths of one symbol are drawn in parts, over one prefix."""
    (chunk,) = small_on_24_gb.chunks([prepared(488, 24)], 10_000)
    assert chunk.slices >= 2
    assert small_on_24_gb.cost(chunk.shapes) <= small_on_24_gb.budget


def test_a_small_budget_gives_the_same_forecasts(
    tiny_forecaster: Forecaster,
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Callable[..., list[Context]],
) -> None:
    """The budget changes the time, not the results: equal tokens, prices to rounding."""
    split = Forecaster(
        tiny_predictor,
        tiny_tokenizer,
        device="cpu",
        dtype="float32",
        max_context=128,
        memory_budget=200_000,
    )
    contexts, horizons = make_contexts([90, 17, 33, 88], seed=6), [8, 3, 8, 1]
    assert len(split._runner.planner.chunks(split._prepare(contexts, horizons), 16)) == 4
    assert (
        len(
            tiny_forecaster._runner.planner.chunks(tiny_forecaster._prepare(contexts, horizons), 16)
        )
        == 1
    )
    progress: list[tuple[int, int]] = []
    parts = split.draw(contexts, horizons, 16, progress=lambda *done: progress.append(done))
    for part, whole in zip(parts, tiny_forecaster.draw(contexts, horizons, 16), strict=True):
        np.testing.assert_array_equal(part.tokens, whole.tokens)
        np.testing.assert_allclose(part.paths, whole.paths, rtol=1e-4)
    assert progress == [(16, 64), (32, 64), (48, 64), (64, 64)]


def test_padding_contexts_are_harmless(
    tiny_forecaster: Forecaster,
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Callable[..., list[Context]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unused slots neither fail nor change the others, with arbitrary memory contents."""
    contexts = make_contexts([30] * 9, seed=7)
    wanted = tiny_forecaster.draw(contexts, 4, 3)
    padded = Forecaster(
        tiny_predictor, tiny_tokenizer, device="cpu", dtype="float32", max_context=128
    )
    padded._runner.planner = replace(padded._runner.planner, pad_contexts=True)
    allocate = torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        return allocate(tensor, *size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    got = padded.draw(contexts, 4, 3)
    (decoder,) = padded._runner.decoders.values()
    assert decoder.groups[0].shape.contexts == 10
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one.paths, other.paths)


def test_an_empty_call_returns_no_paths(tiny_forecaster: Forecaster) -> None:
    """An empty list of contexts gives an empty list of results."""
    assert tiny_forecaster.sample([], 4, 8) == []


def test_kept_buffers_stay_within_the_budget(
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Callable[..., list[Context]],
) -> None:
    """Buffers of earlier shapes are kept for reuse, but only a few and within the budget."""
    budget = 1_500_000
    forecaster = Forecaster(
        tiny_predictor,
        tiny_tokenizer,
        device="cpu",
        dtype="float32",
        max_context=128,
        memory_budget=budget,
    )
    kept = []
    for length in (9, 20, 30, 40, 50, 60, 100, 120):
        forecaster.sample(make_contexts([length, length]), 4, paths=10)
        costs = [
            forecaster._runner.planner.cost(shapes) for shapes, _ in forecaster._runner.decoders
        ]
        assert sum(costs) <= budget
        kept.append(len(costs))
    assert 2 <= max(kept) <= 4
