"""Batch independence: on a CPU in float32 forecasts are bit-identical in every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kronos_stream import Context, Forecaster
from kronos_stream.engine import SampledPaths
from kronos_stream.engine.context import prepare
from kronos_stream.engine.noise import noise_key, uniforms
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.sampling import draw as draw_tokens
from kronos_stream.engine.uncached import generate
from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.config import PredictorConfig, TokenizerConfig

Walks = Callable[..., list[Context]]

WIDTHS = {"tiny": (64, 96), "small": (512, 1024), "base": (832, 2048)}
"""d_model and ff_dim; matrix libraries change their blocking in wide inner dimensions."""
PATHS = 3


class ContextSet(NamedTuple):
    """Contexts of different lengths and horizons, and the paths of each one alone."""

    forecaster: Forecaster
    contexts: list[Context]
    horizons: list[int]
    individual_results: list[SampledPaths]

    def check(self, members: Sequence[int]) -> None:
        """Sample the members in one call; each result must equal the one alone."""
        draws = self.forecaster.draw(
            [self.contexts[i] for i in members], [self.horizons[i] for i in members], PATHS
        )
        for i, draw in zip(members, draws, strict=True):
            if i < len(self.individual_results):
                assert_same(draw, self.individual_results[i])


def assert_same(draw: SampledPaths, wanted: SampledPaths) -> None:
    """Assert bit equality."""
    np.testing.assert_array_equal(draw.tokens, wanted.tokens)
    np.testing.assert_array_equal(draw.paths, wanted.paths)


def random_models(width: int, ff_dim: int) -> tuple[Predictor, Tokenizer]:
    """Untrained networks with few layers and wide inner dimensions, also in the tokenizer."""
    torch.manual_seed(width)
    heads = {64: 4, 512: 8, 832: 16}[width]
    code = TokenizerConfig(256, 4, 512, 2, 2, 6, 6)
    return (
        Predictor(PredictorConfig(6, 6, 2, width, heads, ff_dim)).eval(),
        Tokenizer(code).eval(),
    )


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(WIDTHS))
def context_set(request: pytest.FixtureRequest, make_contexts: Walks) -> ContextSet:
    """301 contexts of 9 to 40 bars and horizons of 1 to 6; the first five are sampled alone."""
    models = random_models(*WIDTHS[request.param])
    forecaster = Forecaster(*models, device="cpu", dtype="float32", max_context=64)
    random = np.random.default_rng(7)
    contexts = make_contexts(random.integers(9, 41, 301).tolist(), seed=5)
    horizons = random.integers(1, 7, 301).tolist()
    horizons[:5] = [6, 1, 4, 6, 5]
    alone = [forecaster.draw([contexts[i]], horizons[i], PATHS)[0] for i in range(5)]
    return ContextSet(forecaster, contexts, horizons, alone)


def test_paths_are_equal_in_batches_of_50_and_300(context_set: ContextSet) -> None:
    """At the start, at the end, or spread among other contexts."""
    context_set.check(range(50))
    context_set.check([*range(5, 301), *range(5)])


def test_logits_are_equal(context_set: ContextSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are equal for one path and three; small differences would rarely change a token."""
    seen: dict[int, list[torch.Tensor]] = {}

    def watched(
        logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, step: int
    ) -> torch.Tensor:
        seen.setdefault(step, []).append(logits.clone())
        return draw_tokens(logits, uniform, sampling, step)

    def rows(members: range, paths: int) -> dict[int, set[bytes]]:
        """Return the logits of the sampled paths at each step, as bytes."""
        seen.clear()
        contexts, horizons = (
            context_set.contexts[members.start : members.stop],
            context_set.horizons,
        )
        context_set.forecaster.draw(contexts, horizons[members.start : members.stop], paths)
        drawn = len(members) * paths
        return {
            step: {row.numpy().tobytes() for x in both for row in x[:drawn]}
            for step, both in seen.items()
        }

    monkeypatch.setattr("kronos_stream.engine.decode.draw", watched)
    for paths in (1, PATHS):
        together = rows(range(140), paths)
        for i in range(4):
            alone = rows(range(i, i + 1), paths)
            assert len(alone) == context_set.horizons[i]
            for step, own in alone.items():
                assert own <= together[step], f"context {i}, step {step}, {paths} paths"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_paths_are_equal_in_any_order_and_on_any_number_of_threads(
    context_set: ContextSet, threads: int
) -> None:
    """Shuffled calls of 1 and 24 contexts."""
    torch.set_num_threads(threads)
    random = np.random.default_rng(threads)
    for size in (1, 24):
        others = random.choice(np.arange(5, 301), size - 1, replace=False)
        members = np.concatenate((random.integers(0, 5, 1), others))
        context_set.check(random.permutation(members).tolist())


def test_paths_are_equal_when_a_small_budget_splits_the_call(
    tiny_predictor: Predictor, tiny_tokenizer: Tokenizer, make_contexts: Walks
) -> None:
    """Chunks and path slices of a context do not depend on the batch."""
    contexts = make_contexts([90, 17, 33, 64, 90, 88], seed=6)
    horizons = [12, 3, 12, 1, 12, 12]
    for budget, chunks, slices in ((600_000, 2, 2), (100_000, 6, 4)):
        split = Forecaster(
            tiny_predictor,
            tiny_tokenizer,
            device="cpu",
            dtype="float32",
            max_context=128,
            memory_budget=budget,
        )
        planned = split._runner.planner.chunks(split._prepare(contexts, horizons), 20)
        assert len(planned) >= chunks
        assert max(chunk.slices for chunk in planned) >= slices
        together = split.draw(contexts, horizons, 20)
        for context, horizon, draw in zip(contexts, horizons, together, strict=True):
            assert_same(split.draw([context], horizon, 20)[0], draw)
        backwards = split.draw(contexts[::-1], horizons[::-1], 20)[::-1]
        for draw, wanted in zip(backwards, together, strict=True):
            assert_same(draw, wanted)


def test_noise_depends_on_seed_series_and_origin(
    tiny_forecaster: Forecaster, make_contexts: Walks
) -> None:
    """Different ones give different tokens; the same ones give the same tokens."""
    (context,) = make_contexts([60])
    later = replace(context, times=np.asarray(context.times) + 7 * 86_400_000)
    (wanted,) = tiny_forecaster.draw([context], 8, 16, seed=1)
    assert_same(tiny_forecaster.draw([replace(context)], 8, 16, seed=1)[0], wanted)
    others = [
        tiny_forecaster.draw([context], 8, 16, seed=2)[0],
        tiny_forecaster.draw([replace(context, series="test:ö/円:5m")], 8, 16, seed=1)[0],
        tiny_forecaster.draw([later], 8, 16, seed=1)[0],
    ]
    for other in others:
        assert (other.tokens != wanted.tokens).mean() > 0.5


def test_contexts_without_a_series_use_their_index(
    tiny_forecaster: Forecaster, make_contexts: Walks
) -> None:
    """The second context without a name gives the paths of a series named 1."""
    contexts = make_contexts([60, 60], named=False)
    draws = tiny_forecaster.draw(contexts, 4, 8)
    for i, draw in enumerate(draws):
        assert_same(draw, tiny_forecaster.draw([replace(contexts[i], series=str(i))], 4, 8)[0])
    twice = tiny_forecaster.draw([contexts[0], contexts[0]], 4, 8)
    assert not np.array_equal(twice[0].tokens, twice[1].tokens)


def test_blocks_of_paths_join(tiny_forecaster: Forecaster, make_contexts: Walks) -> None:
    """Paths sampled in blocks, by ``first_path``, have the tokens of one call."""
    contexts = make_contexts([60, 33], seed=8)
    whole = tiny_forecaster.draw(contexts, 6, 40)
    blocks = [
        tiny_forecaster.draw(contexts, 6, n, first_path=at)
        for at, n in ((0, 17), (17, 1), (18, 22))
    ]
    for i, wanted in enumerate(whole):
        tokens = np.concatenate([block[i].tokens for block in blocks])
        paths = np.concatenate([block[i].paths for block in blocks])
        np.testing.assert_array_equal(tokens, wanted.tokens)
        np.testing.assert_allclose(paths, wanted.paths, rtol=1e-4)


def test_a_shorter_horizon_is_a_prefix(tiny_forecaster: Forecaster, make_contexts: Walks) -> None:
    """Horizon 8 gives the first 8 bars of horizon 12."""
    contexts = make_contexts([60, 33], seed=9)
    for short, long in zip(
        tiny_forecaster.draw(contexts, 8, 20), tiny_forecaster.draw(contexts, 12, 20), strict=True
    ):
        np.testing.assert_array_equal(short.tokens, long.tokens[:, :8])
        np.testing.assert_allclose(short.paths, long.paths[:, :8], rtol=1e-4)


def test_a_path_is_recomputable_alone(
    tiny_forecaster: Forecaster,
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Walks,
) -> None:
    """Path 29 of a call follows from (seed, series, origin), the model and the candles."""
    contexts = make_contexts([60, 33, 71], seed=10)
    sampling = Sampling(0.9, top_p=0.95)
    draws = tiny_forecaster.draw(contexts, 10, 32, temperature=0.9, top_p=0.95, seed=77)
    for i, draw in enumerate(draws):
        item = prepare(contexts[i], i, 10)
        series, times = contexts[i].series, np.asarray(contexts[i].times)
        assert series is not None
        key = torch.tensor([noise_key(77, series, int(times[-1]))])
        _, tokens = generate(
            tiny_predictor,
            tiny_tokenizer,
            torch.from_numpy(item.normalised)[None],
            torch.from_numpy(item.stamps)[None],
            uniforms(key, 29, 1, 10),
            max_context=128,
            sampling=sampling,
        )
        np.testing.assert_array_equal(tokens[0, 0], draw.tokens[29])
