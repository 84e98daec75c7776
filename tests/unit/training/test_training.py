"""Training resumes bit for bit, splits without changing results, and says what is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from kronos_stream.model import Tokenizer, TokenizerConfig, load_predictor, load_tokenizer, save
from kronos_stream.testing.market import Market
from kronos_stream.training import codebook
from kronos_stream.training.errors import TrainingError
from kronos_stream.training.generated import GeneratedWindows
from kronos_stream.training.loop import Trainer, TrainingData
from kronos_stream.training.losses import code_entropy, tokenizer_loss
from kronos_stream.training.optimise import checkpoint_blocks, learning_rate_factor
from kronos_stream.training.processes import ProcessGroup
from kronos_stream.training.settings import Stage, TrainSettings, read_recipe
from kronos_stream.training.stages import PredictorRun, StageRun, TokenizerRun
from kronos_stream.training.windows import Windows, WindowSource, make_batch

CPU = torch.device("cpu")
SMALL = {
    "window": 32, "lookback_min": 8, "lookback_max": 24, "d_model": 16, "n_heads": 4, "ff_dim": 32,
    "n_layers": 2, "s1_bits": 4, "s2_bits": 4, "batch": 4, "warmup": 5, "valid_windows": 8,
    "timeframes": ("5m",), "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def candles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of candles."""
    bars = Market(1, 300_000, seed=3).run(1_500)
    names = ["open", "high", "low", "close", "volume", "amount"]
    path = tmp_path_factory.mktemp("candles") / "candles.csv"
    pd.DataFrame(bars.values[:, 0], columns=names).assign(time=bars.times).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with random weights, saved."""
    torch.manual_seed(0)
    network = Tokenizer(TokenizerConfig(16, 4, 32, 2, 2, 4, 4))
    return save(network, tmp_path_factory.mktemp("tokenizer"))


def small(stage: Stage, **changed: object) -> TrainSettings:
    """Settings of a net that trains in milliseconds."""
    return TrainSettings.build(stage, {**SMALL, "data": ("generated",), **changed})


def trainer(settings: TrainSettings, folder: Path) -> Trainer:
    """A trainer in this process, on generated markets."""
    torch.manual_seed(settings.seed)
    run: StageRun = (
        PredictorRun(settings, CPU)
        if settings.tokenizer
        else TokenizerRun(settings, CPU, ProcessGroup())
    )
    source = GeneratedWindows(settings.timeframes, settings.window, settings.seed)
    return Trainer(run, TrainingData(source, source), settings, folder, device=CPU)


def command(stage: Stage, data: Path, out: Path, *more: str) -> list[str]:
    """The train command on a small net."""
    flags = [
        f"--{k.replace('_', '-')}={','.join(v) if isinstance(v, tuple) else v}"
        for k, v in SMALL.items()
    ]
    return ["-m", "kronos_stream", "train", stage, str(data), "--out", str(out), *flags, *more]


def run(arguments: Sequence[str], launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` to its end."""
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    return load_file(folder / "model.safetensors")


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Weights that mean something: an unrotated key's bias moves no softmax, so its gradient is
    rounding alone, which Adam scales up to full steps.
    """  # noqa: D205
    loaded = weights(folder)
    loaded.pop("dep_layer.cross_attn.k_proj.bias", None)
    return loaded


def test_both_stages_train_from_the_command_line_and_load(candles: Path, tmp_path: Path) -> None:
    common = ("--steps=60", "--log-every=10", "--eval-every=30", "--lr=0.01")
    first = run(command("tokenizer", candles, tmp_path / "tokenizer", *common))
    assert first.returncode == 0, first.stderr
    named = ("--tokenizer", str(tmp_path / "tokenizer"))
    second = run(command("predictor", candles, tmp_path / "predictor", *common, *named))
    assert second.returncode == 0, second.stderr
    for stage in ("tokenizer", "predictor"):
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = [r["loss"] for r in records if "loss" in r]
        assert len(losses) == 6
        assert losses[-1] < losses[0]
    assert any(
        "valid_s1_perplexity" in line
        for line in (tmp_path / "tokenizer" / "metrics.jsonl").read_text().splitlines()
    )

    from kronos_stream import Context, Forecaster
    from kronos_stream.compat import Kronos, KronosTokenizer

    forecaster = Forecaster.from_pretrained(tmp_path, max_context=32, device="cpu")
    bars = Market(1, 300_000, seed=9).run(24)
    context = Context(bars.values[:, 0], bars.times)
    paths = forecaster.sample([context], horizon=3, paths=2)[0]
    assert paths.shape == (2, 3, 6)
    assert np.isfinite(paths).all()
    Kronos.from_pretrained(tmp_path / "predictor")
    KronosTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_killed_run_resumes_to_identical_weights(candles: Path, tmp_path: Path) -> None:
    settings = ("--steps=200", "--save-every=10", "--optimizer=muon", "--log-every=10")
    whole = run(command("tokenizer", candles, tmp_path / "whole", *settings))
    assert whole.returncode == 0, whole.stderr
    arguments = command("tokenizer", candles, tmp_path / "killed", *settings)
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"step": 100,' in metrics.read_text()):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = run(arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line
    ]
    assert steps == list(range(10, 201, 10))


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
    broken._data = TrainingData(Failing(broken._data.train, 7), None)
    with pytest.raises(ConnectionError):
        broken.run()
    again = trainer(settings, tmp_path / "parts")
    assert again.step == 7
    again.run()
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


class Failing:
    """A source that fails from some step on."""

    def __init__(self, source: WindowSource, step: int) -> None:
        self._source, self._step = source, step

    def draw(self, step: int, batch: int, rows: NDArray[np.int64]) -> Windows:
        if step >= self._step:
            raise ConnectionError
        return self._source.draw(step, batch, rows)


def gradients(settings: TrainSettings, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step."""
    one = trainer(settings, folder)
    loss = float(one.gradients()["loss"])
    named = one._stage.network.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("stage", ["tokenizer", "predictor"])
def test_gradient_checkpointing_changes_nothing(
    stage: Stage, tokenizer: Path, tmp_path: Path
) -> None:
    named = {"tokenizer": str(tokenizer)} if stage == "predictor" else {}
    settings = small(stage, dropout=0.1, **named)
    loss, plain = gradients(settings, tmp_path / "a")
    again, recomputed = gradients(replace(settings, grad_checkpoint=True), tmp_path / "b")
    assert again == pytest.approx(loss, rel=1e-6)
    assert difference(plain, recomputed) < 1e-6


def test_accumulation_changes_no_predictor(tokenizer: Path, tmp_path: Path) -> None:
    settings = small("predictor", steps=10, tokenizer=str(tokenizer))
    trainer(settings, tmp_path / "a").run()
    trainer(replace(settings, accumulate=4), tmp_path / "b").run()
    assert difference(trained(tmp_path / "a"), trained(tmp_path / "b")) <= 1e-5


@pytest.mark.parametrize("stage", ["tokenizer", "predictor"])
def test_two_processes_equal_one(
    stage: Stage, candles: Path, tokenizer: Path, tmp_path: Path
) -> None:
    more = ["--steps=10", "--entropy-group=4"]
    if stage == "predictor":
        more += ["--tokenizer", str(tokenizer)]
    one = run(command(stage, candles, tmp_path / "one", *more))
    assert one.returncode == 0, one.stderr
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = run(command(stage, candles, tmp_path / "two", *more), launcher)
    assert two.returncode == 0, two.stderr
    assert difference(trained(tmp_path / "one"), trained(tmp_path / "two")) <= 1e-5


def test_code_entropy_in_groups_is_that_of_the_joint_codes() -> None:
    torch.manual_seed(1)
    apart = torch.nn.functional.normalize(torch.randn(1, 4000, 8), dim=-1)
    same = apart.clone()
    same[..., 1:4] = apart[..., :1]  # four bits that say one thing
    assert float(code_entropy(apart, scale=20, group=1)) == pytest.approx(
        float(code_entropy(same, scale=20, group=1)), rel=0.02
    )
    assert code_entropy(apart, scale=20, group=4) > 1.1 * code_entropy(same, scale=20, group=4)


def test_options_of_the_loss_left_out_are_the_reference(tiny_tokenizer: Tokenizer) -> None:
    x = torch.randn(3, 20, 6)
    out = tiny_tokenizer(x)
    plain = tokenizer_loss(x, out, tiny_tokenizer.config)
    weighted = tokenizer_loss(
        x, out, tiny_tokenizer.config, weights=torch.full((3, 20), 1 / 20), channels=torch.ones(6)
    )
    assert float(weighted.total) == pytest.approx(float(plain.total), rel=1e-6)


def test_poison_after_the_origin_reaches_no_earlier_loss(tokenizer: Path) -> None:
    """The networks are causal, so bars after the origin change nothing before it."""
    windows = GeneratedWindows(("5m",), 32, 0).draw(0, 2, np.arange(2))
    lookback = np.array([16, 16])
    clean = make_batch(windows, lookback, 1.0)
    windows.values[:, 16:] *= 3.0
    moved = make_batch(windows, lookback, 1.0)
    network = load_tokenizer(tokenizer)
    torch.testing.assert_close(network(clean.x).full[:, :16], network(moved.x).full[:, :16])


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
    one = trainer(settings, tmp_path)
    one.run()
    assert one.step < 400
    assert one._best is not None
    assert difference(one._best[1], weights(tmp_path)) == 0


def test_fine_tuning_starts_from_a_checkpoint_gently(tokenizer: Path, tmp_path: Path) -> None:
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


def test_bfloat16_trains(tokenizer: Path, tmp_path: Path) -> None:
    trainer(small("predictor", steps=1, bf16=True, tokenizer=str(tokenizer)), tmp_path / "p").run()
    trainer(small("tokenizer", steps=1, bf16=True), tmp_path / "t").run()


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    trainer(small("tokenizer", steps=2), tmp_path).run()
    with pytest.raises(TrainingError, match=r"other settings \(lr\)"):
        trainer(small("tokenizer", steps=2, lr=0.5), tmp_path)


def test_a_diverged_run_says_so_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    one = trainer(small("tokenizer", steps=5), tmp_path)
    with torch.no_grad():
        one._parameters[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        one.run()
    assert not (tmp_path / "state.pt").exists()


def test_a_collapsed_codebook_is_seen() -> None:
    tokens = torch.randint(0, 16, (4000,), generator=torch.Generator().manual_seed(0))
    assert codebook.measure_usage(tokens, tokens, 4, 4).warning() is None
    dull = codebook.measure_usage(tokens, torch.full_like(tokens, 3), 4, 4)
    assert dull.dead_bits == 4
    assert dull.s2_perplexity == pytest.approx(1)
    assert "collapses" in (dull.warning() or "")


def test_the_rate_rises_then_falls() -> None:
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
        ({"learning_rate": 1}, "no setting"),
        ({"valid_share": 0.5, "test_share": 0.5}, "train on"),
    ],
)
def test_a_bad_setting_is_one_line(changed: dict[str, object], reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        small("tokenizer", **changed)


def test_a_bad_file_ends_the_command_with_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("time,open\n1,2\n")
    done = run(command("tokenizer", bad, tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing column" in done.stderr
    assert not (tmp_path / "out").exists()


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
