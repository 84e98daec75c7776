"""Call isolation: memory order, torch defaults and earlier failures do not change results."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch

from kronos_stream import Context, ContextError, Forecaster
from kronos_stream.engine import dense
from kronos_stream.engine.plan import _split
from kronos_stream.model import Predictor, Tokenizer

Walks = Callable[..., list[Context]]


def test_memory_order_does_not_matter(tiny_forecaster: Forecaster, make_contexts: Walks) -> None:
    """Sums over bars depend on the memory order of an array; forecasts do not."""
    contexts = make_contexts([90, 60, 33], seed=3)
    turned = [replace(c, values=np.asfortranarray(c.values)) for c in contexts]
    for one, other in zip(
        tiny_forecaster.sample(contexts, 6, 4), tiny_forecaster.sample(turned, 6, 4), strict=True
    ):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("built", ["before", "inside"])
def test_torch_defaults_do_not_matter(
    tiny_forecaster: Forecaster,
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Walks,
    built: str,
) -> None:
    """The caller's default type, default device, autocast and gradient mode have no effect."""
    contexts = make_contexts([50, 20], seed=4)
    want = tiny_forecaster.sample(contexts, 5, 3, anchor=True)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            forecaster = tiny_forecaster
            if built == "inside":
                forecaster = Forecaster(
                    tiny_predictor, tiny_tokenizer, device="cpu", dtype="float32", max_context=128
                )
            got = forecaster.sample(contexts, 5, 3, anchor=True)
        assert torch.get_default_dtype() == torch.float64
        assert torch.empty(0).device.type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_horizon_after_a_gap_uses_the_usual_step(
    tiny_forecaster: Forecaster, make_contexts: Walks
) -> None:
    """Without a timeframe the horizon uses the most common step, not the last one."""
    (context,) = make_contexts([40], seed=5)
    times = np.asarray(context.times).copy()
    step = times[1] - times[0]
    times[-1] += 288 * step
    (draw,) = tiny_forecaster.draw([replace(context, times=times, timeframe=None)], 3, 1)
    assert (draw.times - times[-1]).tolist() == [step, 2 * step, 3 * step]


def test_times_in_seconds_are_rejected(tiny_forecaster: Forecaster, make_contexts: Walks) -> None:
    """Times in a unit other than ms are rejected if they contradict the timeframe."""
    (context,) = make_contexts([40], seed=6)
    seconds = replace(context, times=np.asarray(context.times) // 1000, timeframe="5m")
    with pytest.raises(ContextError, match="must be ms UTC"):
        tiny_forecaster.sample([seconds], 3, 1)


def test_a_huge_horizon_is_rejected_before_allocation(
    tiny_forecaster: Forecaster, make_contexts: Walks
) -> None:
    """The window is checked before memory of the horizon's size is allocated."""
    start = monotonic()
    with pytest.raises(ContextError, match="shorten the horizon"):
        tiny_forecaster.sample(make_contexts([40], seed=7), 10**12, 1)
    assert monotonic() - start < 10


def test_negative_prices_without_amount_are_accepted(
    tiny_forecaster: Forecaster, make_contexts: Walks
) -> None:
    """A spread may be negative; the negative derived amount is not an error."""
    (context,) = make_contexts([40], seed=8)
    values = np.asarray(context.values)[:, :5].copy()
    values[:, :4] -= 2 * values[:, :4].max()
    (paths,) = tiny_forecaster.sample([replace(context, values=values)], 3, 2)
    assert np.isfinite(paths).all()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("series", "\ud800", "UTF-8"),
        ("series", 5, "text"),
        ("timeframe", 5, "text"),
        ("timezone", 5, "text"),
    ],
)
def test_labels_must_be_encodable_text(
    tiny_forecaster: Forecaster, make_contexts: Walks, field: str, value: object, reason: str
) -> None:
    """Labels must be text that can be encoded as UTF-8."""
    (context,) = make_contexts([40], seed=9)
    labels: dict[str, Any] = {field: value}
    with pytest.raises(ContextError, match=reason):
        tiny_forecaster.sample([replace(context, **labels)], 3, 1)


def test_a_failed_call_does_not_affect_the_next_one(
    tiny_predictor: Predictor,
    tiny_tokenizer: Tokenizer,
    make_contexts: Walks,
) -> None:
    """Buffers in use when a call fails are dropped; the next call is not affected."""
    forecaster = Forecaster(tiny_predictor, tiny_tokenizer, device="cpu", max_context=128)
    contexts = make_contexts([50, 20], seed=10)
    want = forecaster.sample(contexts, 5, 3)
    kept = len(forecaster._runner.decoders)

    def fail(stage: str) -> None:
        if stage == "detokenise":
            raise MemoryError

    forecaster.on_stage = fail
    with pytest.raises(MemoryError):
        forecaster.sample(contexts, 5, 3)
    assert len(forecaster._runner.decoders) == kept - 1
    forecaster.on_stage = None
    assert all(
        np.array_equal(a, b) for a, b in zip(forecaster.sample(contexts, 5, 3), want, strict=True)
    )


@pytest.mark.parametrize(("count", "budget"), [(1000, 333), (1000, 334), (7, 2), (5, 5), (1, 0)])
def test_chunks_are_even(count: int, budget: int) -> None:
    """Equal contexts form chunks of equal size, except for the last, which may be smaller."""
    spans = _split([1] * count, budget)
    sizes = [last - first for first, last in spans]
    assert sum(sizes) == count
    assert max(sizes) <= max(budget, 1)
    assert len(spans) == -(-count // max(budget, 1))
    assert len(set(sizes[:-1])) <= 1
    assert sizes[0] - sizes[-1] < len(sizes)


def test_a_cpu_without_batch_invariant_products_causes_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If rows always depend on the batch, loading warns and uses the strictest limits."""
    monkeypatch.setattr(dense, "_is_batch_invariant", lambda *_: False)
    with pytest.warns(UserWarning, match="depend on the batch"):
        assert dense.find_batch_invariant_limits([(8, 8)]).block == 64


def test_products_of_nano_are_batch_invariant_on_this_machine() -> None:
    """The bundled model loads without that warning, because others recompute its forecasts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Forecaster.from_pretrained("nano", device="cpu", dtype="float32")


@pytest.mark.parametrize("block", [None, 64])
def test_packed_products_are_correct(block: int | None) -> None:
    """oneDNN products, undivided and in inner blocks, written, added and with strided input."""
    if not dense.can_pack():
        pytest.skip("this torch has no oneDNN")
    weight, bias, x = torch.randn(6, 150), torch.randn(6), torch.randn(33, 300)[:, ::2]
    want = x @ weight.T + bias
    product = dense.Dense(
        weight,
        bias,
        device=torch.device("cpu"),
        dtype=torch.float32,
        limits=dense.BatchInvariantLimits(packed=True, block=block, rows=4),
    )
    total = torch.ones(33, 6)
    product.multiply_add(x, total)
    torch.testing.assert_close(product(x), want)
    torch.testing.assert_close(product.multiply_into(x, torch.empty(33, 6)), want)
    torch.testing.assert_close(total, want + 1)
