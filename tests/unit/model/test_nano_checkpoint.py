"""Bundled model: size, loading by name, and a check of the model card's figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kronos_stream import Context, Forecaster
from kronos_stream.commands._evaluate import forecast_function
from kronos_stream.commands._generated_cases import generated_cases
from kronos_stream.compat import Kronos
from kronos_stream.evaluation.walk_forward import evaluate
from kronos_stream.model import load_predictor, load_tokenizer
from kronos_stream.model.checkpoint import BUNDLED_FOLDER, find_model
from kronos_stream.testing.market import Market
from kronos_stream.training.reconstruction import reconstruction


@pytest.fixture(scope="module")
def nano() -> Forecaster:
    """The bundled model on the CPU."""
    return Forecaster.from_pretrained("nano", device="cpu", dtype="float32")


def test_nano_is_small() -> None:
    found = find_model("nano")
    networks = load_predictor(found.predictor.name), load_tokenizer(found.tokenizer.name)
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    assert parameters <= 1_500_000
    files = Path(found.predictor.name).parent.rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 4_000_000
    assert (found.max_context or 0) >= 256


def test_nano_forecasts_by_name(nano: Forecaster) -> None:
    bars = Market(1, 3_600_000, seed=4).run(232)
    context = Context(bars.values[:, 0], bars.times)
    (paths,) = nano.sample([context], horizon=24, paths=20, anchor=True)
    last = bars.values[-1, 0, 3]
    assert paths.shape == (20, 24, 6)
    assert np.isfinite(paths).all()
    assert 0.5 * last < paths[..., 3].min() < last < paths[..., 3].max() < 2 * last


def test_bars_after_the_origin_do_not_change_the_forecast(nano: Forecaster) -> None:
    bars = Market(1, 300_000, seed=5).run(140)
    values, changed = bars.values[:, 0], bars.values[:, 0].copy()
    changed[128:] = np.nan
    first, second = (
        nano.sample([Context(v[:128], bars.times[:128], series="s")], horizon=4, paths=4)[0]
        for v in (values, changed)
    )
    np.testing.assert_array_equal(first, second)


def test_nano_beats_the_random_walk_on_unseen_markets(nano: Forecaster) -> None:
    """A coarse check of the model card's figures, on few forecasts."""
    cases = list(generated_cases(["5m", "15m", "1h"], count=288, horizon=8, seed=77))
    report = evaluate(cases, forecast_function(nano), paths=32)
    assert report.crps_ratio["random walk"].value < 1.01
    assert 0.70 < report.coverage["80%"].value < 0.90
    assert report.volatility_ratio["random walk"].value < 0.95
    codec = reconstruction(load_tokenizer(find_model("nano").tokenizer.name), cases[:96])
    assert codec.full.value < 0.01
    assert codec.coarse.value > 1.2 * codec.full.value
    assert codec.codebook.warning() is None


def test_networks_load_by_name_and_by_folder() -> None:
    """Each network of the bundled model loads by the model's name and by its folder."""
    for source in ("nano", BUNDLED_FOLDER / "nano"):
        assert load_predictor(source).config.n_layers == 4
        assert load_tokenizer(source).config.s1_bits == 9
    assert Kronos.from_pretrained("nano").config == load_predictor("nano").config
