"""The engine and the reference's own API on it give the reference implementation's numbers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kronos_stream import Context, Forecaster
from kronos_stream.compat import Kronos, KronosPredictor, KronosTokenizer
from kronos_stream.model import Predictor, Tokenizer
from kronos_stream.model.checkpoint import CheckpointError

Cases = dict[str, NDArray[Any]]
Series = tuple[pd.DataFrame, "pd.Series[pd.Timestamp]", "pd.Series[pd.Timestamp]"]

COLUMNS = ["open", "high", "low", "close", "volume", "amount"]
CASES = ["within", "exact_fill", "short", "rollover", "long_history"]
RELATIVE = 1e-4
FORWARD = 1e-4


def greedy_case(expected: dict[str, Any], name: str) -> tuple[int, int]:
    """Bars of history and bars to come of a greedy case."""
    (case,) = (c for c in expected["cases"] if c["name"] == name)
    return case["lookback"], case["horizon"]


def series(cases: Cases, i: int, bars: int, horizon: int) -> Series:
    """Series i as a user holds it: history, its times, and the times to come."""
    times = pd.Series(pd.to_datetime(cases[f"time_{i}"], unit="s"))
    frame = pd.DataFrame(cases[f"ohlcva_{i}"][:bars], columns=COLUMNS)
    return frame, times[:bars], times[bars : bars + horizon]


def tensors(cases: Cases, *names: str) -> list[Tensor]:
    """Copies of the named arrays."""
    return [torch.from_numpy(cases[name].copy()) for name in names]


@pytest.fixture
def tokenizer(parity_folder: Path) -> KronosTokenizer:
    return KronosTokenizer.from_pretrained(parity_folder / "tiny" / "tokenizer")


@pytest.fixture
def model(parity_folder: Path) -> Kronos:
    return Kronos.from_pretrained(str(parity_folder / "tiny" / "predictor"))


@pytest.fixture
def predictor(model: Kronos, tokenizer: KronosTokenizer) -> KronosPredictor:
    return KronosPredictor(model, tokenizer, device="cpu", max_context=128)


@pytest.mark.parametrize("name", CASES[:3])
def test_greedy_paths_are_the_references(
    tiny_forecaster: Forecaster, parity_cases: Cases, parity_expected: dict[str, Any], name: str
) -> None:
    """Where the window holds history and horizon, the engine's greedy paths are the reference's."""
    bars, horizon = greedy_case(parity_expected, name)
    contexts = []
    for i in range(3):
        times = parity_cases[f"time_{i}"] * 1000
        future = times[bars : bars + horizon]
        contexts.append(
            Context(parity_cases[f"ohlcva_{i}"][:bars], times[:bars], future_times=future)
        )
    wanted = parity_cases[f"greedy_{name}"]
    for i, paths in enumerate(tiny_forecaster.sample(contexts, horizon, paths=2, top_k=1)):
        assert paths.shape == (2, horizon, 6)
        assert paths.dtype == np.float32
        np.testing.assert_allclose(paths[0], wanted[i], rtol=RELATIVE)
        np.testing.assert_array_equal(paths[1], paths[0])


@pytest.mark.parametrize("name", CASES[3:])
def test_beyond_the_window_sample_refuses(
    tiny_forecaster: Forecaster, parity_cases: Cases, parity_expected: dict[str, Any], name: str
) -> None:
    """Where they do not fit, ``sample`` says so rather than give other numbers."""
    bars, horizon = greedy_case(parity_expected, name)
    context = Context(parity_cases["ohlcva_0"][:bars], parity_cases["time_0"][:bars] * 1000)
    with pytest.raises(ValueError, match=f"{bars} bars and a horizon of {horizon} exceed"):
        tiny_forecaster.sample([context], horizon, paths=1)


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


def test_beyond_the_window_compat_warns(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """The slow exact way past max_context is announced."""
    frame, past, future = series(parity_cases, 0, 124, 5)
    announced = "124 bars and 5 to come exceed max_context 128"
    with pytest.warns(UserWarning, match=announced) as one:
        predictor.predict(frame, past, future, 5, verbose=False)
    with pytest.warns(UserWarning, match=announced) as batch:
        predictor.predict_batch([frame], [past], [future], 5, verbose=False)
    assert [warning.filename for warning in (*one, *batch)] == [__file__] * 2


@pytest.mark.filterwarnings("ignore:.*exceed max_context:UserWarning")
def test_the_longest_horizon(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """A window's worth of bars is decoded whole; one more is refused, as decoding cannot be."""
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
def test_past_the_window_the_modules_are_left_alone(
    predictor: KronosPredictor, parity_cases: Cases
) -> None:
    """A sliding forecast leaves modes as they were and nothing to fold anew."""
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
def test_the_callers_torch_modes(
    predictor: KronosPredictor, parity_cases: Cases, bars: int
) -> None:
    """Inference mode and autocast around a call change nothing, within the window or past it."""
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


def test_the_frame_is_the_references(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """Six float32 columns in the model's order, indexed by the times asked for."""
    frame, past, future = series(parity_cases, 0, 60, 4)
    out = predictor.predict(frame, past, future, 4, verbose=False)
    assert list(out.columns) == COLUMNS
    assert out.index.equals(pd.Index(future))
    assert (out.dtypes == np.float32).all()


def test_encode_and_decode(tokenizer: KronosTokenizer, parity_cases: Cases) -> None:
    """Half and joint indices are the fixture's, and both decode to the fixture's candles."""
    (x,) = tensors(parity_cases, "x_norm")
    s1, s2 = tokenizer.encode(x, half=True)
    np.testing.assert_array_equal(s1, parity_cases["s1"], strict=True)
    np.testing.assert_array_equal(s2, parity_cases["s2"], strict=True)
    joint = tokenizer.encode(x)
    assert isinstance(joint, Tensor)
    np.testing.assert_array_equal(joint, parity_cases["s1"] + 64 * parity_cases["s2"])
    for decoded in (tokenizer.decode(joint), tokenizer.decode([s1, s2], half=True)):
        np.testing.assert_allclose(decoded.detach(), parity_cases["decoded"], rtol=0, atol=FORWARD)


def test_tokenizer_forward(
    tokenizer: KronosTokenizer, parity_cases: Cases, parity_expected: dict[str, Any]
) -> None:
    """The training pass: both reconstructions, the quantiser's loss, the joint indices."""
    (x,) = tensors(parity_cases, "x_norm")
    (coarse, full), loss, quantised, joint = tokenizer(x)
    np.testing.assert_allclose(coarse.detach(), parity_cases["recon_coarse"], rtol=0, atol=FORWARD)
    np.testing.assert_allclose(full.detach(), parity_cases["recon"], rtol=0, atol=FORWARD)
    assert loss.item() == pytest.approx(parity_expected["bsq_loss_eval"], abs=1e-5)
    assert torch.equal(quantised > 0, tokenizer.code(*tensors(parity_cases, "s1", "s2")) > 0)
    np.testing.assert_array_equal(joint, parity_cases["s1"] + 64 * parity_cases["s2"])


def test_decode_s1_and_s2(model: Kronos, tiny_predictor: Predictor, parity_cases: Cases) -> None:
    """Logits of both levels are the fixture's and the modules'; float stamps are understood."""
    s1, s2, stamp = tensors(parity_cases, "s1", "s2", "stamp")
    with torch.no_grad():
        s1_logits, hidden = model.decode_s1(s1, s2, stamp.float())
        last = s1_logits[:, -1:].argmax(-1)
        s2_logits = model.decode_s2(hidden, last)
        wanted = tiny_predictor.s2_logits_last(hidden, last[:, 0])
    np.testing.assert_allclose(s1_logits, parity_cases["s1_logits"], rtol=0, atol=FORWARD)
    np.testing.assert_allclose(hidden[:, -1], parity_cases["hidden_last"], rtol=0, atol=FORWARD)
    np.testing.assert_allclose(
        s2_logits[:, -1], parity_cases["s2_logits_last"], rtol=0, atol=FORWARD
    )
    torch.testing.assert_close(s2_logits[:, -1], wanted)


def test_the_training_pass(
    model: Kronos, parity_cases: Cases, parity_expected: dict[str, Any]
) -> None:
    """In training mode the teacher-forced pass has the reference's cross entropies."""
    s1, s2, stamp = tensors(parity_cases, "s1", "s2", "stamp")
    s1_next, s2_next = s1[:, 1:], s2[:, 1:]
    s1_logits, s2_logits = model.train()(
        s1[:, :-1], s2[:, :-1], stamp[:, :-1], use_teacher_forcing=True, s1_targets=s1_next
    )
    wanted = parity_expected["predictor_train"]
    for logits, target, name in ((s1_logits, s1_next, "ce_s1"), (s2_logits, s2_next, "ce_s2")):
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        assert loss.item() == pytest.approx(wanted[name], abs=1e-5)


def test_round_trip(model: Kronos, tokenizer: KronosTokenizer, tmp_path: Path) -> None:
    """What is saved loads again with the same settings and weights, in eval mode."""
    pairs: list[tuple[Predictor | Tokenizer, Callable[[Path], Predictor | Tokenizer]]] = [
        (model, Kronos.from_pretrained),
        (tokenizer, KronosTokenizer.from_pretrained),
    ]
    for module, load in pairs:
        folder = tmp_path / type(module).__name__
        next(module.parameters()).data.add_(1)
        assert isinstance(module, Kronos | KronosTokenizer)
        module.save_pretrained(folder)
        again = load(folder)
        assert type(again) is type(module)
        assert again.config == module.config
        assert not again.training
        for name, tensor in module.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_the_hubs_options(parity_folder: Path, tmp_path: Path) -> None:
    """They reach the hub's client; others, the reference's overrides included, are refused."""
    commit = "0123456789abcdef" * 2 + "01234567"
    source = parity_folder / "tiny" / "predictor"
    shutil.copytree(source, tmp_path / "models--some--model" / "snapshots" / commit)
    loaded = Kronos.from_pretrained(
        "some/model", revision=commit, cache_dir=tmp_path, local_files_only=True
    )
    assert loaded.config == Kronos.from_pretrained(source, local_files_only=True).config
    with pytest.raises(CheckpointError, match="some/other: cannot be had with these options"):
        Kronos.from_pretrained("some/other", cache_dir=tmp_path, local_files_only=True)
    for kind in (Kronos, KronosTokenizer):
        with pytest.raises(TypeError, match="token_dropout_p"):
            kind.from_pretrained(source, token_dropout_p=0.0)  # type: ignore[call-arg]


def test_halves_that_do_not_belong_together(model: Kronos, tokenizer: KronosTokenizer) -> None:
    """Bits that differ are refused at once."""
    sizes = tokenizer.config.to_dict()
    other = KronosTokenizer(**{**sizes, "s1_bits": 8, "s2_bits": 4})
    with pytest.raises(ValueError, match="do not belong together"):
        KronosPredictor(model, other, device="cpu")


def test_manual_seed_fixes_a_forecast(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """The same global seed gives the same forecast; going on gives another."""

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
    """No amount: volume x mean price. No volume: both are 0. The input is not changed."""
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


def test_errors(predictor: KronosPredictor, parity_cases: Cases) -> None:
    """What the reference refuses is refused, and so are times that do not fit the rows."""
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
        ((3, 1.0, 0, 0.9, 0), "sample_count 0: at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.predict(frame, past, future, *arguments, verbose=False)  # type: ignore[misc]
    with pytest.raises(ValueError, match="one length, not 1, 2 and 1"):
        predictor.predict_batch([frame], [past, past], [future], 3, verbose=False)


@pytest.mark.parametrize("way", ["no_grad", "data", "fused"])
def test_changed_weights_are_used(
    predictor: KronosPredictor, parity_cases: Cases, way: str
) -> None:
    """Weights changed in place after a forecast, in whatever way, are used by the next one."""
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
