"""Forecasts of the compatible API equal those of the reference implementation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from kronos_stream.compat import Kronos, KronosPredictor, KronosTokenizer
from tests.support.parity import CASES, COLUMNS, RELATIVE, Cases, greedy_case, series


@pytest.mark.filterwarnings("ignore:.*exceed max_context:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_compat_greedy_forecasts(
    predictor: KronosPredictor, parity_cases: Cases, parity_expected: dict[str, Any], name: str
) -> None:
    """``predict_batch`` and ``predict`` give the reference's rows in every case."""
    bars, horizon = greedy_case(parity_expected, name)
    wanted = parity_cases[f"greedy_{name}"]
    inputs = [series(parity_cases, i, bars, horizon) for i in range(3)]
    frames, past, future = (list(column) for column in zip(*inputs, strict=True))
    batch = predictor.predict_batch(frames, past, future, horizon, top_k=1, verbose=False)
    one = predictor.predict(*inputs[1], horizon, top_k=1, sample_count=2, verbose=False)
    for i, frame in enumerate(batch):
        np.testing.assert_allclose(frame.to_numpy(), wanted[i], rtol=RELATIVE)
    np.testing.assert_allclose(one.to_numpy(), wanted[1], rtol=RELATIVE)


def test_compat_warns_beyond_the_window(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """The slow exact computation beyond max_context causes a warning."""
    frame, past, future = series(parity_cases, 0, 124, 5)
    announced = "124 bars and a horizon of 5 exceed max_context 128"
    with pytest.warns(UserWarning, match=announced) as one:
        predictor.predict(frame, past, future, 5, verbose=False)
    with pytest.warns(UserWarning, match=announced) as batch:
        predictor.predict_batch([frame], [past], [future], 5, verbose=False)
    assert [warning.filename for warning in (*one, *batch)] == [__file__] * 2


@pytest.mark.filterwarnings("ignore:.*exceed max_context:UserWarning")
def test_the_longest_horizon(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """A full window of bars is decoded at once; one more bar is rejected."""
    predictor.max_context = 20
    frame, past, future = series(parity_cases, 0, 30, 21)
    with pytest.raises(ValueError, match="pred_len 21: expected 1 to max_context 20"):
        predictor.predict(frame, past, future, 21, verbose=False)
    out = predictor.predict(frame, past, future[:20], 20, top_k=1, verbose=False).to_numpy()
    shorter = predictor.predict(frame, past, future[:19], 19, top_k=1, verbose=False).to_numpy()
    assert out.shape == (20, 6)
    assert np.isfinite(out).all()
    # Decoding is causal, but the shorter one's window begins with a bar of history.
    assert not np.array_equal(out[:19], shorter)


@pytest.mark.filterwarnings("ignore:.*exceed max_context:UserWarning")
def test_forecasts_beyond_the_window_do_not_change_the_modules(
    predictor: KronosPredictor, parity_cases: Cases
) -> None:
    """A sliding forecast changes no module mode and requires no new folding."""
    inputs = series(parity_cases, 0, 60, 3)
    predictor.predict(*inputs, 3, verbose=False)
    engine = predictor._forecaster
    predictor.model.train()
    predictor.model.transformer.eval()
    modes = [part.training for part in predictor.model.modules()]
    predictor.predict(*series(parity_cases, 0, 124, 5), 5, verbose=False)
    assert [part.training for part in predictor.model.modules()] == modes
    predictor.predict(*inputs, 3, verbose=False)
    assert predictor._forecaster is engine


@pytest.mark.filterwarnings("ignore:.*exceed max_context:UserWarning")
@pytest.mark.parametrize("bars", [60, 124])
def test_the_callers_torch_modes_do_not_matter(
    predictor: KronosPredictor, parity_cases: Cases, bars: int
) -> None:
    """Inference mode and autocast around a call have no effect, within the window and beyond."""
    inputs = series(parity_cases, 0, bars, 5)
    wanted = predictor.predict(*inputs, 5, top_k=1, verbose=False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fresh = KronosPredictor(
            copy.deepcopy(predictor.model), copy.deepcopy(predictor.tokenizer), "cpu", 128
        )
        pd.testing.assert_frame_equal(fresh.predict(*inputs, 5, top_k=1, verbose=False), wanted)


def test_modules_are_moved_once(model: Kronos, tokenizer: KronosTokenizer) -> None:
    """Both are on the predictor's device as soon as it exists, as with the reference."""
    predictor = KronosPredictor(model, tokenizer, device="meta")
    assert predictor.device == torch.device("meta")
    assert predictor.model is model
    for module in (model, tokenizer):
        assert {p.device.type for p in module.parameters()} == {"meta"}


def test_the_data_frame_equals_the_references(
    predictor: KronosPredictor, parity_cases: Cases
) -> None:
    """Six float32 columns in the model's order, indexed by the requested times."""
    frame, past, future = series(parity_cases, 0, 60, 4)
    out = predictor.predict(frame, past, future, 4, verbose=False)
    assert list(out.columns) == COLUMNS
    assert out.index.equals(pd.Index(future))
    assert (out.dtypes == np.float32).all()


def test_manual_seed_fixes_a_forecast(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """The same global seed gives the same forecast; the next call gives a different one."""

    def predict() -> NDArray[np.float32]:
        frame = predictor.predict(
            *series(parity_cases, 2, 50, 6), 6, top_p=1.0, sample_count=3, verbose=False
        )
        return frame.to_numpy()

    torch.manual_seed(3)
    first, second = predict(), predict()
    torch.manual_seed(3)
    np.testing.assert_array_equal(predict(), first)
    assert not np.array_equal(first, second)


def test_top_k_switches_top_p_off(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """As in the reference, with top_k > 0 a top_p that would keep one token keeps them all."""
    inputs = series(parity_cases, 0, 50, 6)
    outs = []
    for top_p in (1.0, 1e-6):
        torch.manual_seed(4)
        outs.append(predictor.predict(*inputs, 6, top_k=20, top_p=top_p, verbose=False))
    pd.testing.assert_frame_equal(outs[0], outs[1])
    greedy = predictor.predict(*inputs, 6, top_k=1, verbose=False)
    assert not outs[0].equals(greedy)


@pytest.mark.parametrize("missing", [["amount"], ["volume"], ["volume", "amount"]])
def test_missing_columns(
    predictor: KronosPredictor, parity_cases: Cases, missing: list[str]
) -> None:
    """Without amount: volume x mean price. Without volume: both are 0. The input is not changed."""
    frame, past, future = series(parity_cases, 0, 60, 3)
    filled = frame.copy()
    if "volume" in missing:
        filled[["volume", "amount"]] = 0.0
    else:
        filled["amount"] = filled["volume"] * filled[COLUMNS[:4]].mean(axis=1)
    short = frame.drop(columns=missing)
    before = short.copy()
    got = predictor.predict(short, past, future, 3, top_k=1, verbose=False)
    wanted = predictor.predict(filled, past, future, 3, top_k=1, verbose=False)
    pd.testing.assert_frame_equal(got, wanted)
    pd.testing.assert_frame_equal(short, before)


def test_invalid_arguments_are_rejected(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """Arguments that the reference rejects, and times that do not match the rows, are rejected."""
    frame, past, future = series(parity_cases, 0, 60, 3)
    holed = frame.copy()
    holed.loc[7, "volume"] = np.nan
    bad: list[tuple[Any, Any, Any, str]] = [
        (frame.to_numpy(), past, future, "must be a pandas DataFrame"),
        (frame.drop(columns="low"), past, future, r"price columns \['low'\] not found"),
        (holed, past, future, "NaN"),
        (frame, past[1:], future, "60 rows need as many x_timestamp"),
        (frame, past, future[1:], "pred_len 3 as many y_timestamp"),
    ]
    for df, x, y, message in bad:
        with pytest.raises(ValueError, match=message):
            predictor.predict(df, x, y, 3, verbose=False)
    for arguments, message in (
        ((0,), "pred_len 0: expected 1 to"),
        ((3, 1.0, 0, 0.9, 0), "sample_count 0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.predict(frame, past, future, *arguments, verbose=False)  # type: ignore[misc]
    with pytest.raises(ValueError, match="one length, not 1, 2 and 1"):
        predictor.predict_batch([frame], [past, past], [future], 3, verbose=False)


@pytest.mark.parametrize("way", ["no_grad", "data", "fused"])
def test_changed_weights_are_used(
    predictor: KronosPredictor, parity_cases: Cases, way: str
) -> None:
    """Weights changed in place after a forecast are used by the next one."""
    inputs = series(parity_cases, 1, 60, 5)
    before = predictor.predict(*inputs, 5, top_k=1, verbose=False)
    weight = predictor.model.get_parameter("head.proj_s1.weight")
    if way == "fused":
        weight.grad = torch.ones_like(weight).index_fill_(0, torch.arange(0, 64, 2), -1.0)
        torch.optim.AdamW([weight], lr=1.0, fused=True).step()
    elif way == "data":
        weight.data.mul_(-1)
    else:
        with torch.no_grad():
            weight.mul_(-1)
    after = predictor.predict(*inputs, 5, top_k=1, verbose=False)
    fresh = KronosPredictor(predictor.model, predictor.tokenizer, "cpu", 128)
    wanted = fresh.predict(*inputs, 5, top_k=1, verbose=False)
    assert not np.allclose(after.to_numpy(), before.to_numpy(), rtol=1e-3)
    pd.testing.assert_frame_equal(after, wanted)
