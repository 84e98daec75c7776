"""Training settings of both stages."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from kronos_stream.market.timeframe import Timeframe
from kronos_stream.training.errors import TrainingError

Stage = Literal["tokenizer", "predictor"]

GENERATED = "generated"
"""Name given instead of files to train on generated markets."""


def _setting(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of one run; ``metadata["help"]`` of every field describes it.

    :meth:`defaults` gives the defaults, which differ by stage and for fine-tuning.
    """

    # Data
    data: tuple[str, ...] = _setting(
        (), "Candle files, folders of them, or 'generated' for generated markets."
    )
    timeframe: str = _setting("", "Bar length, for example 5m; empty: inferred from each file.")
    timeframes: tuple[str, ...] = _setting(
        ("1m", "5m", "15m", "1h", "4h", "1d"), "Bar lengths of generated markets."
    )
    window: int = _setting(256, "Bars per training window; do not forecast with a longer context.")
    lookback_min: int = _setting(
        64, "Minimum number of bars before the origin, which determine the normalisation."
    )
    lookback_max: int = _setting(
        232, "Maximum number of bars before the origin, which determine the normalisation."
    )
    lookback_weight: float = _setting(
        0.25,
        "Loss weight of lookback bars, which are part of the normalisation statistics; "
        "later bars have weight 1.",
    )
    valid_share: float = _setting(0.1, "Share of the data, by time, held out for validation.")
    test_share: float = _setting(
        0.1, "Share of the data, the newest by time, not used in training."
    )
    valid_windows: int = _setting(128, "Number of held-out windows in an evaluation.")
    # Run
    seed: int = _setting(0, "Seed of all random numbers.")
    steps: int = _setting(4000, "Total number of optimiser steps.")
    stop_at: int = _setting(
        0,
        "Stop early after this step with the schedule of --steps unchanged, to create a draft for "
        "--init; 0: off.",
    )
    batch: int = _setting(8, "Windows per step, over all processes and micro-batches.")
    accumulate: int = _setting(1, "Sequential micro-batches per step, to save memory.")
    init: str = _setting(
        "",
        "Checkpoint to fine-tune; its sizes are used, and defaults such as lr are smaller; "
        "empty: train from scratch.",
    )
    device: str = _setting("auto", "cpu, cuda, or auto.")
    threads: int = _setting(0, "CPU threads; 0: torch's default.")
    bf16: bool = _setting(
        default=False, help_text="Compute matrix products in bfloat16 (autocast)."
    )
    grad_checkpoint: bool = _setting(
        default=False,
        help_text="Recompute blocks in the backward pass: less memory, about a third slower.",
    )
    log_every: int = _setting(20, "Steps between log lines.")
    eval_every: int = _setting(500, "Steps between evaluations on held-out windows.")
    save_every: int = _setting(250, "Steps between saved states from which a run can be resumed.")
    early_stop: int = _setting(
        0, "End after this many evaluations without improvement and keep the best; 0: never."
    )
    half: bool = _setting(default=False, help_text="Export weights as float16.")
    # Optimiser
    optimizer: Literal["adamw", "muon"] = _setting(
        "adamw",
        "adamw, or muon for the blocks' matrices and adamw for the rest.",
        ("adamw", "muon"),
    )
    lr: float = _setting(1e-3, "Peak learning rate of AdamW.")
    lr_muon: float = _setting(0.02, "Peak learning rate of Muon.")
    warmup: int = _setting(100, "Steps over which the learning rate rises.")
    lr_floor: float = _setting(0.02, "Final learning rate as a share of the peak.")
    weight_decay: float = _setting(0.0, "Decoupled weight decay of matrices.")
    clip: float = _setting(1.0, "Maximum gradient norm; larger gradients are scaled down.")
    # Network, from scratch
    d_model: int = _setting(96, "Width.")
    n_heads: int = _setting(4, "Attention heads.")
    ff_dim: int = _setting(192, "Width of the feed-forward layers.")
    n_layers: int = _setting(4, "Blocks of the predictor.")
    enc_layers: int = _setting(3, "Encoder layers of the tokenizer, including the embedding.")
    dec_layers: int = _setting(3, "Decoder layers of the tokenizer, including the embedding.")
    s1_bits: int = _setting(9, "Bits of the coarse token (tokenizer).")
    s2_bits: int = _setting(9, "Bits of the fine token (tokenizer).")
    dropout: float = _setting(0.0, "Dropout of feed-forward layers and residuals.")
    # Tokenizer
    beta: float = _setting(0.0, "Weight of the commitment loss.")
    gamma0: float = _setting(
        1.0, "Weight of each bit's entropy, which is minimised so that bits are decisive."
    )
    gamma: float = _setting(
        1.1, "Weight of the entropy over codes, which is maximised so that all codes are used."
    )
    zeta: float = _setting(0.005, "Weight of both entropies together.")
    entropy_scale: float = _setting(
        20.0, "Inverse temperature of the soft bits in both entropies; the reference's is 1."
    )
    entropy_group: int = _setting(
        1,
        "Bits per group whose joint entropy is maximised; 1: each bit alone, as in the reference.",
    )
    price_weight: float = _setting(
        2.0, "Loss weight of the four price channels; volume and amount have weight 1."
    )
    # Predictor
    tokenizer: str = _setting("", "Checkpoint of the tokenizer.")
    s2_on: Literal["true", "sampled"] = _setting(
        "true",
        "s1 token that conditions s2: the true one, or one sampled from the model (as in the "
        "paper).",
        ("true", "sampled"),
    )

    def __post_init__(self) -> None:
        """Reject invalid combinations, each with a one-line message."""
        if not 2 <= self.lookback_min <= self.lookback_max < self.window:
            raise TrainingError(
                f"need 2 <= lookback_min <= lookback_max < window, got {self.lookback_min}, "
                f"{self.lookback_max}, {self.window}"
            )
        for name in (
            "steps",
            "batch",
            "accumulate",
            "log_every",
            "eval_every",
            "save_every",
            "valid_windows",
        ):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1")
        if self.batch % self.accumulate:
            raise TrainingError(f"accumulate {self.accumulate} does not divide batch {self.batch}")
        if not (
            self.valid_share >= 0
            and self.test_share >= 0
            and self.valid_share + self.test_share < 1
        ):
            raise TrainingError(
                "valid_share + test_share must be below 1, to leave data to train on"
            )
        for text in (*self.timeframes, *filter(None, [self.timeframe])):
            try:
                Timeframe.parse(text)
            except ValueError as error:
                raise TrainingError(str(error)) from None

    @classmethod
    def defaults(cls, stage: Stage, *, fine_tune: bool = False) -> Self:
        """Return the defaults: sizes of the bundled model, or small steps for fine-tuning."""
        base = cls() if stage == "tokenizer" else cls(d_model=128, ff_dim=256, lr=2e-3)
        if fine_tune:
            return replace(
                base,
                lr=1e-5,
                optimizer="adamw",
                warmup=100,
                steps=2000,
                early_stop=5,
                eval_every=100,
                weight_decay=0.01,
            )
        return base

    @classmethod
    def build(cls, stage: Stage, *layers: Mapping[str, Any]) -> Self:
        """Return the defaults overridden by ``layers`` (a recipe, then command-line options)."""
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer
        known = {f.name for f in fields(cls)}
        for name in merged:
            if name not in known:
                raise TrainingError(f"unknown training setting {name!r}")
        merged = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
        return replace(cls.defaults(stage, fine_tune=bool(merged.get("init"))), **merged)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as stored beside the checkpoint."""
        return asdict(self)


def read_recipe(path: Path, name: str) -> dict[str, Any]:
    """Read the table ``name`` of a TOML recipe. Raises TrainingError."""
    try:
        table = tomllib.loads(path.read_text()).get(name)
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{path}: invalid TOML ({error})") from None
    if not isinstance(table, dict):
        raise TrainingError(f"{path}: no [{name}] table")
    return table
