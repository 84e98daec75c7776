"""Training: exact resumption, split batches, losses, exports and error messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kronos_stream.model import Tokenizer, TokenizerConfig, load_predictor, load_tokenizer
from kronos_stream.training import codebook
from kronos_stream.training.errors import TrainingError
from kronos_stream.training.generated import GeneratedWindows
from kronos_stream.training.loop import TrainingData
from kronos_stream.training.losses import code_entropy, tokenizer_loss
from kronos_stream.training.optimise import checkpoint_blocks, learning_rate_factor
from kronos_stream.training.settings import Stage, TrainSettings, read_recipe
from kronos_stream.training.windows import Windows, WindowSource, make_batch
from tests.support.small_training import difference, small, trained, trainer, weights


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_at_any_step_is_exact(optimizer: str, tokenizer: Path, tmp_path: Path) -> None:
    settings = small(
        "predictor",
        steps=12,
        optimizer=optimizer,
        tokenizer=str(tokenizer),
        s2_on="sampled",
        dropout=0.1,
        save_every=1,
    )
    trainer(settings, tmp_path / "whole").run()
    # Stopped by an error of the source after seven steps.
    broken = trainer(settings, tmp_path / "parts")
    broken._data = TrainingData(FailingSource(broken._data.train, 7), None)
    with pytest.raises(ConnectionError):
        broken.run()
    again = trainer(settings, tmp_path / "parts")
    assert again.step == 7
    again.run()
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


class FailingSource:
    """Source that raises an error from a step on."""

    def __init__(self, source: WindowSource, step: int) -> None:
        self._source, self._step = source, step

    def draw(self, step: int, batch: int, rows: NDArray[np.int64]) -> Windows:
        if step >= self._step:
            raise ConnectionError
        return self._source.draw(step, batch, rows)


def gradients(settings: TrainSettings, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of the first step."""
    run = trainer(settings, folder)
    loss = float(run.gradients()["loss"])
    named = run._stage.network.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("stage", ["tokenizer", "predictor"])
def test_gradient_checkpointing_does_not_change_gradients(
    stage: Stage, tokenizer: Path, tmp_path: Path
) -> None:
    named = {"tokenizer": str(tokenizer)} if stage == "predictor" else {}
    settings = small(stage, dropout=0.1, **named)
    loss, plain = gradients(settings, tmp_path / "a")
    again, recomputed = gradients(replace(settings, grad_checkpoint=True), tmp_path / "b")
    assert again == pytest.approx(loss, rel=1e-6)
    assert difference(plain, recomputed) < 1e-6


def test_accumulation_does_not_change_the_predictor(tokenizer: Path, tmp_path: Path) -> None:
    settings = small("predictor", steps=10, tokenizer=str(tokenizer))
    trainer(settings, tmp_path / "a").run()
    trainer(replace(settings, accumulate=4), tmp_path / "b").run()
    assert difference(trained(tmp_path / "a"), trained(tmp_path / "b")) <= 1e-5


def test_grouped_code_entropy_detects_identical_bits() -> None:
    torch.manual_seed(1)
    apart = torch.nn.functional.normalize(torch.randn(1, 4000, 8), dim=-1)
    same = apart.clone()
    same[..., 1:4] = apart[..., :1]  # four identical bits
    assert float(code_entropy(apart, scale=20, group=1)) == pytest.approx(
        float(code_entropy(same, scale=20, group=1)), rel=0.02
    )
    assert code_entropy(apart, scale=20, group=4) > 1.1 * code_entropy(same, scale=20, group=4)


def test_default_loss_options_equal_uniform_weights(tiny_tokenizer: Tokenizer) -> None:
    x = torch.randn(3, 20, 6)
    out = tiny_tokenizer(x)
    plain = tokenizer_loss(x, out, tiny_tokenizer.config)
    weighted = tokenizer_loss(
        x, out, tiny_tokenizer.config, weights=torch.full((3, 20), 1 / 20), channels=torch.ones(6)
    )
    assert float(weighted.total) == pytest.approx(float(plain.total), rel=1e-6)


def test_bars_after_the_origin_do_not_change_earlier_reconstructions(tokenizer: Path) -> None:
    """The tokenizer is causal, and the normalisation uses only the lookback."""
    windows = GeneratedWindows(("5m",), 32, 0).draw(0, 2, np.arange(2))
    lookback = np.array([16, 16])
    original = make_batch(windows, lookback, 1.0)
    windows.values[:, 16:] *= 3.0
    changed = make_batch(windows, lookback, 1.0)
    network = load_tokenizer(tokenizer)
    torch.testing.assert_close(network(original.x).full[:, :16], network(changed.x).full[:, :16])


def test_early_stopping_keeps_the_best(tokenizer: Path, tmp_path: Path) -> None:
    settings = small(
        "predictor",
        steps=400,
        eval_every=5,
        early_stop=2,
        lr=0.3,
        warmup=1,
        tokenizer=str(tokenizer),
    )
    run = trainer(settings, tmp_path)
    run.run()
    assert run.step < 400
    assert run._best is not None
    assert difference(run._best[1], weights(tmp_path)) == 0


def test_fine_tuning_starts_from_a_checkpoint_with_small_steps(
    tokenizer: Path, tmp_path: Path
) -> None:
    settings = small("tokenizer", init=str(tokenizer), steps=3)
    assert settings.lr <= 1e-5
    assert settings.early_stop > 0
    assert settings.warmup > 0
    trainer(settings, tmp_path).run()
    assert 0 < difference(weights(tokenizer), weights(tmp_path)) < 1e-4


def test_half_precision_export_loads(tokenizer: Path, tmp_path: Path) -> None:
    settings = small("predictor", steps=2, half=True, tokenizer=str(tokenizer))
    trainer(settings, tmp_path).run()
    stored = weights(tmp_path)
    assert stored["norm.weight"].dtype == torch.float16
    assert stored["transformer.0.self_attn.rotary.inv_freq"].dtype == torch.float32
    assert next(load_predictor(tmp_path).parameters()).dtype == torch.float32


@pytest.mark.parametrize("stage", ["tokenizer", "predictor"])
def test_bfloat16_losses_are_close_to_float32(
    stage: Stage, tokenizer: Path, tmp_path: Path
) -> None:
    """The first loss differs by the rounding of bfloat16, and a step changes the weights."""
    named = {"tokenizer": str(tokenizer)} if stage == "predictor" else {}
    settings = small(stage, steps=1, **named)
    loss, _ = gradients(settings, tmp_path / "float32")
    rounded, _ = gradients(replace(settings, bf16=True), tmp_path / "bfloat16")
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=0.02)
    run = trainer(replace(settings, bf16=True), tmp_path / "run")
    before = [p.detach().clone() for p in run._parameters]
    run.run()
    after = run._parameters
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(p).all() for p in after)


def test_resuming_with_other_settings_is_rejected(tmp_path: Path) -> None:
    trainer(small("tokenizer", steps=2), tmp_path).run()
    with pytest.raises(TrainingError, match=r"other settings \(lr\)"):
        trainer(small("tokenizer", steps=2, lr=0.5), tmp_path)


def test_a_diverged_run_is_reported_and_not_saved(tmp_path: Path) -> None:
    run = trainer(small("tokenizer", steps=5), tmp_path)
    with torch.no_grad():
        run._parameters[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        run.run()
    assert not (tmp_path / "state.pt").exists()


def test_a_collapsed_codebook_is_reported() -> None:
    tokens = torch.randint(0, 16, (4000,), generator=torch.Generator().manual_seed(0))
    assert codebook.measure_usage(tokens, tokens, 4, 4).warning() is None
    collapsed = codebook.measure_usage(tokens, torch.full_like(tokens, 3), 4, 4)
    assert collapsed.dead_bits == 4
    assert collapsed.s2_perplexity == pytest.approx(1)
    assert "collapsing" in (collapsed.warning() or "")


def test_the_learning_rate_rises_then_falls() -> None:
    settings = small("tokenizer", steps=100, warmup=10)
    rates = [learning_rate_factor(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1)
    assert rates[-1] < 0.03


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lookback_max": 40}, "lookback"),
        ({"accumulate": 3}, "does not divide"),
        ({"steps": 0}, "steps"),
        ({"timeframes": ("5x",)}, "timeframe"),
        ({"learning_rate": 1}, "unknown training setting"),
        ({"valid_share": 0.5, "test_share": 0.5}, "train on"),
    ],
)
def test_invalid_settings_are_rejected(changed: dict[str, object], reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        small("tokenizer", **changed)


def test_checkpointing_keeps_parameter_names() -> None:
    network = Tokenizer(TokenizerConfig(16, 4, 32, 2, 2, 4, 4))
    names = list(network.state_dict())
    checkpoint_blocks(network)
    assert list(network.state_dict()) == names


def test_the_recipe_of_the_bundled_model_is_valid() -> None:
    import kronos_stream

    recipe = Path(kronos_stream.__file__).parent / "checkpoints" / "nano" / "recipe.toml"
    stages: tuple[Stage, ...] = ("tokenizer", "predictor")
    for stage in stages:
        TrainSettings.build(stage, read_recipe(recipe, stage))
