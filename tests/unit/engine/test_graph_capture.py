"""Graph capture: a captured decode loop contains no host value of its batch.

A CUDA graph records kernels and their addresses, and no Python. The same is done here on a CPU: the
loop's operations are recorded once, the buffers refilled with other contexts, and the recorded
operations run again on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from kronos_stream import Context, Forecaster
from kronos_stream.engine import SampledPaths
from kronos_stream.engine.decode import Decoder
from kronos_stream.model import Predictor, Tokenizer

Walks = Callable[..., list[Context]]
Operation = tuple[Any, Sequence[Any], Mapping[str, Any], list[Any]]

# Lengths differ within the buckets of 8 bars; horizons make two groups.
HORIZONS = [6, 3, 6, 3]
FIRST, SECOND = [41, 43, 46, 20], [45, 47, 42, 18]
PATHS = 5
TO_THE_HOST = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
}
"""Operations that wait for the device, or copy from the host: no graph can hold them."""


class Recorder(TorchDispatchMode):
    """Recorder of operations with their tensors, kept alive so that identities stay unique."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_flatten(out)[0]))
        return out

    def replay(self) -> None:
        """Run the operations again; tensors that no operation made are used directly."""
        made: dict[int, Any] = {}

        def current(value: Any) -> Any:
            return made.get(id(value), value)

        for func, args, kwargs, outs in self.operations:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(outs, tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new

    def host_syncs(self) -> set[str]:
        """Return the names of operations that a graph could not contain."""
        names = {func.name() for func, *_ in self.operations}
        masks = {
            func.name()
            for func, args, *_ in self.operations
            if func.name().startswith("aten::index")
            for index in tree_flatten(args[1:2])[0]
            if isinstance(index, Tensor) and index.dtype == torch.bool
        }
        return names & TO_THE_HOST | masks


@contextmanager
def recorded(decoder: Decoder) -> Iterator[Recorder]:
    """Run the decoder's loop once more and record it."""
    with torch.inference_mode():
        with Recorder() as recorder:
            decoder._loop()
        yield recorder


@pytest.fixture
def forecaster(tiny_predictor: Predictor, tiny_tokenizer: Tokenizer) -> Forecaster:
    """A forecaster with its own decoders."""
    return Forecaster(
        tiny_predictor, tiny_tokenizer, device="cpu", dtype="float32", max_context=128
    )


def draw(
    forecaster: Forecaster, walks: Walks, lengths: Sequence[int], seed: int
) -> list[SampledPaths]:
    return forecaster.draw(walks(lengths, seed=seed), HORIZONS, PATHS, seed=seed)


def test_a_replay_on_another_batch_gives_its_tokens(
    tiny_forecaster: Forecaster, forecaster: Forecaster, make_contexts: Walks
) -> None:
    """A loop recorded on one batch gives the tokens of another batch with the same shapes."""
    first = draw(forecaster, make_contexts, FIRST, seed=1)
    (decoder,) = forecaster._runner.decoders.values()
    with recorded(decoder) as recorder:
        assert len(recorder.operations) > 100
        draw(forecaster, make_contexts, SECOND, seed=2)
        assert list(forecaster._runner.decoders.values()) == [decoder]
        # Clear the results of the eager loop.
        decoder._tokens.fill_(-1)
        for group in decoder.groups:
            for cache in (group.trunk, group.s2):
                cache.keys.fill_(float("nan"))
                cache.values.fill_(float("nan"))
        recorder.replay()
    wanted = draw(tiny_forecaster, make_contexts, SECOND, seed=2)
    seen = 0
    for group in decoder.groups:
        tokens = decoder._tokens[group.rows, : group.shape.horizon].numpy()
        for own in tokens.reshape(group.shape.contexts, PATHS, -1, 2):
            matches = [np.array_equal(own, draw.tokens) for draw in wanted]
            assert sum(matches) == 1
            assert not np.array_equal(own, first[matches.index(True)].tokens)
            seen += 1
    assert seen == len(wanted)


def test_the_loop_never_waits_for_the_device(forecaster: Forecaster, make_contexts: Walks) -> None:
    """Inside the loop no operation reads a value back or selects by a mask."""
    draw(forecaster, make_contexts, FIRST, seed=1)
    (decoder,) = forecaster._runner.decoders.values()
    with recorded(decoder) as recorder:
        assert recorder.host_syncs() == set()


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x[0].item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
)
def test_the_recorder_detects_a_host_synchronisation(sync: Callable[[Tensor], object]) -> None:
    """Check of the recorder: each kind of wait is detected."""
    with Recorder() as recorder:
        sync(torch.ones(2))
    assert recorder.host_syncs()


def test_the_recorder_detects_a_captured_host_value() -> None:
    """Check of the recorder: a value read by Python keeps its first value in a replay."""
    source, baked, kept = torch.ones(1), torch.zeros(1), torch.zeros(1)
    with Recorder() as recorder:
        baked.copy_(source * float(source))
        kept.copy_(source * source)
    source.fill_(3)
    recorder.replay()
    assert (baked.item(), kept.item()) == (3, 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_cuda_graphs_give_eager_results(
    tiny_predictor: Predictor, tiny_tokenizer: Tokenizer, make_contexts: Walks, top_p: float
) -> None:
    """On a GPU the captured loop gives the same results for new batches as an eager run."""

    def fresh() -> Forecaster:
        return Forecaster(
            tiny_predictor, tiny_tokenizer, device="cuda", dtype="float32", max_context=128
        )

    # Nine contexts of one shape use ten slots, so the graph includes padding.
    graphed = fresh()
    for seed in range(4):
        lengths = [41 + seed, 43, 46 - seed, 20 + seed, *[30 + seed] * 9]
        contexts, horizons = make_contexts(lengths, seed=seed), [6, 3, 6, 3, *[5] * 9]
        got = graphed.draw(contexts, horizons, PATHS, top_p=top_p, seed=seed)
        wanted = fresh().draw(contexts, horizons, PATHS, top_p=top_p, seed=seed)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.paths, other.paths, rtol=1e-4)
    (decoder,) = graphed._runner.decoders.values()
    assert decoder._graph is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_on_the_gpu_are_folded(
    tiny_predictor: Predictor, tiny_tokenizer: Tokenizer, make_contexts: Walks
) -> None:
    """Models on the GPU, where users of the reference keep them, are folded like others."""
    models = deepcopy(tiny_predictor).cuda(), deepcopy(tiny_tokenizer).cuda()
    moved = Forecaster(*models, device="cuda", dtype="float32", max_context=128)
    plain = Forecaster(
        tiny_predictor, tiny_tokenizer, device="cuda", dtype="float32", max_context=128
    )
    contexts = make_contexts([40, 33])
    for one, other in zip(moved.draw(contexts, 4, 3), plain.draw(contexts, 4, 3), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert all(p.is_cuda for model in models for p in model.parameters())
