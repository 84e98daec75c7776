"""The reference implementation's Python API on this engine: change the import, keep the code.

Names, arguments and results are those of github.com/shiyu-coder/Kronos (MIT), so arguments keep
their order and their capitals here. Two things differ on purpose: inference is always in eval
mode, and ``torch.manual_seed`` fixes a forecast, but draws other noise than the reference's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from kronos_stream.engine.context import (
    CHANNELS,
    Prepared,
    complete,
    denormalise,
    normalise,
    time_stamps,
)
from kronos_stream.engine.forecaster import Forecaster
from kronos_stream.engine.noise import noise_key, uniforms
from kronos_stream.engine.sampling import Sampling
from kronos_stream.engine.uncached import generate
from kronos_stream.model.checkpoint import load_predictor, load_tokenizer, save
from kronos_stream.model.config import PredictorConfig, TokenizerConfig
from kronos_stream.model.predictor import Predictor
from kronos_stream.model.tokenizer import Tokenizer
from kronos_stream.training.losses import bsq_loss

_Module = TypeVar("_Module", bound=nn.Module)

_PRICES = list(CHANNELS[:4])
_ROWS_AT_ONCE = 64
"""Windows recomputed together past max_context: enough to fill a CPU, small in memory."""


class KronosTokenizer(Tokenizer):
    """The tokenizer under its reference name."""

    def __init__(
        self,
        d_in: int,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        n_enc_layers: int,
        n_dec_layers: int,
        ffn_dropout_p: float,
        attn_dropout_p: float,
        resid_dropout_p: float,
        s1_bits: int,
        s2_bits: int,
        beta: float,
        gamma0: float,
        gamma: float,
        zeta: float,
        group_size: int,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(TokenizerConfig(**arguments))
        self.s1_bits, self.s2_bits, self.codebook_dim = s1_bits, s2_bits, s1_bits + s2_bits

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **_: Any) -> Self:
        """Load from a folder or a hub id, in eval mode; other options of the hub are ignored."""
        loaded = load_tokenizer(source, revision)
        return _adopt(cls(**loaded.config.to_dict()), loaded)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        save(self, folder)

    def encode(self, x: Tensor, half: bool = False) -> Tensor | list[Tensor]:
        """Normalised candles (B, S, d_in) to joint indices (B, S), or [s1, s2] with ``half``."""
        s1, s2 = self.tokenise(x)
        return [s1, s2] if half else s1 + (s2 << self.s1_bits)

    def decode(self, x: Tensor | Sequence[Tensor], half: bool = False) -> Tensor:
        """The inverse of :meth:`encode`: (B, S, d_in)."""
        if half:
            s1, s2 = x
            return self.detokenise(s1, s2)
        if not isinstance(x, Tensor):
            raise TypeError("joint indices are one tensor; half=True takes [s1, s2]")
        return self.detokenise(x & (1 << self.s1_bits) - 1, x >> self.s1_bits)

    def forward(  # type: ignore[override]
        self, x: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """((coarse, full), BSQ loss, quantised code, joint indices) of candles (B, S, d_in)."""
        out = super().forward(x)
        bits = (out.unit > 0).long() << torch.arange(self.codebook_dim, device=x.device)
        loss = bsq_loss(out.unit, out.quantised, self.config)
        return (out.coarse, out.full), loss, out.quantised, bits.sum(-1)


class Kronos(Predictor):
    """The predictor under its reference name."""

    def __init__(
        self,
        s1_bits: int,
        s2_bits: int,
        n_layers: int,
        d_model: int,
        n_heads: int,
        ff_dim: int,
        ffn_dropout_p: float,
        attn_dropout_p: float,
        resid_dropout_p: float,
        token_dropout_p: float,
        learn_te: bool,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(PredictorConfig(**arguments))
        self.s1_bits, self.s2_bits = s1_bits, s2_bits

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **_: Any) -> Self:
        """Load from a folder or a hub id, in eval mode; other options of the hub are ignored."""
        loaded = load_predictor(source, revision)
        return _adopt(cls(**loaded.config.to_dict()), loaded)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        save(self, folder)

    def forward(
        self,
        s1_ids: Tensor,
        s2_ids: Tensor,
        stamp: Tensor | None = None,
        padding_mask: Tensor | None = None,
        use_teacher_forcing: bool = False,
        s1_targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, S, 2^bits) of both levels, s2 given ``s1_targets`` or a drawn s1."""
        s1_logits, hidden = self.decode_s1(s1_ids, s2_ids, stamp, padding_mask)
        if use_teacher_forcing:
            if s1_targets is None:
                raise ValueError("use_teacher_forcing=True needs s1_targets")
        else:
            drawn = torch.multinomial(F.softmax(s1_logits.detach(), -1).flatten(0, 1), 1)
            s1_targets = drawn.view(s1_ids.shape)
        return s1_logits, self.decode_s2(hidden, s1_targets)

    def decode_s1(
        self,
        s1_ids: Tensor,
        s2_ids: Tensor,
        stamp: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """s1 logits (B, S, 2^s1_bits) and the trunk's states (B, S, d)."""
        _refuse_mask(padding_mask)
        hidden = self.hidden(s1_ids, s2_ids, None if stamp is None else stamp.long())
        return self.s1_logits(hidden), hidden

    def decode_s2(
        self, context: Tensor, s1_ids: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        """s2 logits for s1 tokens, (B, 1) for the last state or (B, S) for all, as the reference.

        With all, keys and queries are rotated, and causal in training mode only.
        """
        _refuse_mask(padding_mask)
        if s1_ids.shape[1] == 1:
            query = self.embedding.emb_s1(s1_ids)
            conditioned = self.dep_layer(context, query, rotate=False, causal=False)
            out: Tensor = self.head.proj_s2(conditioned)
            return out
        return self.s2_logits(context, s1_ids, rotate=True, causal=self.training)


class KronosPredictor:
    """Forecasts from DataFrames; the mean of ``sample_count`` paths, as the reference."""

    def __init__(
        self,
        model: Predictor,
        tokenizer: Tokenizer,
        device: str | None = None,
        max_context: int = 512,
        clip: float = 5,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.clip = clip
        self.device = device or "auto"
        self._forecaster: Forecaster | None = None
        self._folded: list[tuple[int, int, float]] = []

    def predict(
        self,
        df: pd.DataFrame,
        x_timestamp: Any,
        y_timestamp: Any,
        pred_len: int,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        use_kv_cache: bool = True,
    ) -> pd.DataFrame:
        """Continue ``df`` by ``pred_len`` bars; a DataFrame indexed by ``y_timestamp``."""
        return self.predict_batch(
            [df],
            [x_timestamp],
            [y_timestamp],
            pred_len,
            T,
            top_k,
            top_p,
            sample_count,
            verbose,
            use_kv_cache,
        )[0]

    def predict_batch(
        self,
        df_list: Sequence[pd.DataFrame],
        x_timestamp_list: Sequence[Any],
        y_timestamp_list: Sequence[Any],
        pred_len: int,
        T: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        use_kv_cache: bool = True,
    ) -> list[pd.DataFrame]:
        """Continue several series at once; their lengths may differ (the reference's may not).

        top_k > 0 switches top_p off, as in the reference. ``use_kv_cache`` is accepted and
        changes nothing: the engine caches wherever that is exact.
        """
        del use_kv_cache
        if not len(df_list) == len(x_timestamp_list) == len(y_timestamp_list):
            raise ValueError(
                "df_list, x_timestamp_list and y_timestamp_list must have one length, not "
                f"{len(df_list)}, {len(x_timestamp_list)} and {len(y_timestamp_list)}"
            )
        prepared = [
            self._prepare(i, *series, pred_len)
            for i, series in enumerate(
                zip(df_list, x_timestamp_list, y_timestamp_list, strict=True)
            )
        ]
        sampling = Sampling(T, top_k, 1.0 if top_k > 0 else top_p)
        seed = int(torch.randint(2**62, ()).item())
        with Progress(disable=not verbose, transient=True) as bar:
            task = bar.add_task("forecasting", total=len(prepared))
            means: dict[int, NDArray[np.float32]] = {}
            fitting = [i for i, p in enumerate(prepared) if p.length + pred_len <= self.max_context]
            if fitting:
                draws = self._engine().draw_prepared(
                    [prepared[i] for i in fitting], sample_count, sampling, seed=seed
                )
                means |= {i: d.paths.mean(axis=0) for i, d in zip(fitting, draws, strict=True)}
                bar.advance(task, len(fitting))
            for i, item in enumerate(prepared):
                if i not in means:
                    means[i] = self._recompute(item, sample_count, sampling, seed)
                    bar.advance(task)
        return [
            pd.DataFrame(means[i], columns=list(CHANNELS), index=y_timestamp_list[i])
            for i in range(len(prepared))
        ]

    def _prepare(
        self, index: int, df: pd.DataFrame, x_timestamp: Any, y_timestamp: Any, pred_len: int
    ) -> Prepared:
        values = _candles(df)
        if len(x_timestamp) != len(df) or len(y_timestamp) != pred_len:
            raise ValueError(
                f"series {index}: {len(df)} rows need as many x_timestamp (not {len(x_timestamp)}) "
                f"and pred_len {pred_len} as many y_timestamp (not {len(y_timestamp)})"
            )
        mean, std, normalised = normalise(values, self.clip)
        past, future = _wall_clock(x_timestamp), _wall_clock(y_timestamp)
        return Prepared(
            name=str(index),
            normalised=normalised,
            mean=mean,
            std=std,
            stamps=time_stamps(np.concatenate((past, future))),
            future_times=future,
            origin=int(past[-1]),
            last_close=float(values[-1, 3]),
        )

    def _engine(self) -> Forecaster:
        """The folded weights, folded anew after the modules' parameters have changed."""
        state = _state(self.model) + _state(self.tokenizer)
        if self._forecaster is None or state != self._folded:
            self._forecaster = Forecaster(
                self.model,
                self.tokenizer,
                device=self.device,
                dtype="float32",
                max_context=self.max_context,
            )
            self._folded = state
        return self._forecaster

    def _recompute(
        self, item: Prepared, paths: int, sampling: Sampling, seed: int
    ) -> NDArray[np.float32]:
        """The mean path (H, 6) past max_context, where the window slides."""
        warnings.warn(
            f"{item.length} bars and {item.horizon} to come exceed max_context {self.max_context}: "
            "every step recomputes its window, which is exact and slow",
            UserWarning,
            stacklevel=4,
        )
        device = self._engine().device
        models = self.model.to(device), self.tokenizer.to(device)
        modes = [model.training for model in models]
        key = torch.tensor([noise_key(seed, item.name, item.origin)], device=device)
        total = np.zeros((item.horizon, len(CHANNELS)), np.float64)
        try:
            for model in models:
                model.eval()
            for first in range(0, paths, _ROWS_AT_ONCE):
                count = min(_ROWS_AT_ONCE, paths - first)
                candles, _ = generate(
                    *models,
                    torch.from_numpy(item.normalised)[None].to(device),
                    torch.from_numpy(item.stamps)[None].to(device),
                    uniforms(key, first, count, item.horizon),
                    max_context=self.max_context,
                    sampling=sampling,
                )
                total += candles[0].sum(0).cpu().numpy()
        finally:
            for restored, mode in zip(models, modes, strict=True):
                restored.train(mode)
        return denormalise((total / paths).astype(np.float32), item.mean, item.std)


def _candles(df: pd.DataFrame) -> NDArray[np.float32]:
    """The six channels (L, 6), missing volume and amount filled by the reference's rules."""
    if not isinstance(df, pd.DataFrame):
        raise ValueError("Input must be a pandas DataFrame.")  # noqa: TRY004 - as the reference
    missing = [name for name in _PRICES if name not in df.columns]
    if missing:
        raise ValueError(f"price columns {missing} not found in the DataFrame")
    columns = _PRICES
    if "volume" in df.columns:
        columns = list(CHANNELS if "amount" in df.columns else CHANNELS[:5])
    values = df[columns].to_numpy(np.float64)
    if np.isnan(values).any():
        raise ValueError("the DataFrame contains NaN values in price or volume columns")
    return complete(values).astype(np.float32)


def _state(module: nn.Module) -> list[tuple[int, int, float]]:
    """Something that differs once a parameter has changed, for each of them."""
    parameters = [p.detach() for p in module.parameters()]
    # Fused optimisers and edits of ``.data`` leave the version as it was; the sum tells.
    sums = torch.stack([p.sum(dtype=torch.float32) for p in parameters]).tolist()
    return [
        (p.data_ptr(), p._version, total)  # noqa: SLF001 - torch offers no public name
        for p, total in zip(parameters, sums, strict=True)
    ]


def _wall_clock(timestamps: Any) -> NDArray[np.int64]:
    """ms of the local wall clock: what the reference reads minute, hour and day from."""
    times = pd.DatetimeIndex(timestamps)
    if times.tz is not None:
        times = times.tz_localize(None)
    return times.to_numpy().astype("datetime64[ms]").astype(np.int64)


def _refuse_mask(padding_mask: Tensor | None) -> None:
    if padding_mask is not None:
        raise ValueError("padding_mask is not supported (nor does it run in the reference)")


def _adopt(module: _Module, loaded: nn.Module) -> _Module:
    module.load_state_dict(loaded.state_dict())
    return module.eval()
