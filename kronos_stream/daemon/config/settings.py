"""Daemon settings and their defaults.

Every field is an environment variable: ``KRONOS_STREAM_`` and its name in upper case, parts joined
by ``__``. The attribute docstrings are the help texts of ``kronos-stream run --help``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PlainValidator,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kronos_stream.daemon.config.cores import usable_cores
from kronos_stream.daemon.config.symbols_file import read_symbols_file
from kronos_stream.daemon.inference.protocol import ForecastConfig
from kronos_stream.forecast.outlook import PublishedPaths
from kronos_stream.forecast.quantiles import check_supported, required_paths
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.watchlist import WatchlistEntry

ENV_PREFIX = "KRONOS_STREAM_"


class SettingsError(Exception):
    """Invalid settings; one line per problem, with its cause and remedy."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


def variable_name(*path: str) -> str:
    """Environment variable of a field: ``("http", "port")`` → KRONOS_STREAM_HTTP__PORT."""
    return ENV_PREFIX + "__".join(path).upper()


def _parse_timeframe(value: object) -> Timeframe:
    return value if isinstance(value, Timeframe) else Timeframe.parse(str(value))


def _parse_entry(value: object) -> WatchlistEntry:
    return value if isinstance(value, WatchlistEntry) else WatchlistEntry.parse(str(value))


def _validate_probability(p: float) -> float:
    required_paths(p)
    return p


def _default_state_file() -> Path:
    """In systemd's state directory, else in the user's (XDG base directories)."""
    if folder := os.environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(folder) / "state.sqlite"
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "kronos-stream" / "state.sqlite"


def _default_threads() -> int:
    """All usable cores but one, which is left to the daemon."""
    return max(1, usable_cores() - 1)


_Path = Annotated[Path, AfterValidator(Path.expanduser)]


_CONFIG = SettingsConfigDict(
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,
    protected_namespaces=(),  # a field may be called model_revision
    use_attribute_docstrings=True,
    validate_default=True,
)


class MessageSettings(BaseModel):
    """Content of forecast messages."""

    model_config = _CONFIG

    paths: PublishedPaths = "none"
    """Sample paths in each message: none, their closes (close), or all channels (ohlcva)."""


class HttpSettings(BaseModel):
    """HTTP server for /metrics, /series, /forecasts, /readyz and /healthz."""

    model_config = _CONFIG

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces. If other machines can connect, /series and
    /forecasts need a token."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """Port to listen on; 0 chooses a free one."""
    token: SecretStr | None = None
    """Token that clients must send as Authorization: Bearer; /readyz and /healthz need none."""

    @field_validator("token")
    @classmethod
    def _validate_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token and not re.fullmatch(r"[\w.~+/=-]{16,}", token.get_secret_value(), re.ASCII):
            raise ValueError("expected at least 16 of the characters A-Z a-z 0-9 . _ ~ + / = -")
        return token


class LogSettings(BaseModel):
    """Log on stderr."""

    model_config = _CONFIG

    format: Literal["console", "json"] = "console"
    """console: readable lines; json: one JSON object per line."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""


class Settings(BaseSettings):
    """All settings of the daemon, and in ``options`` those of its connectors.

    The class does not read the environment: ``read_settings`` does, and passes keywords.
    """

    model_config = _CONFIG

    role: Literal["all", "ingest", "forecast"] = "all"
    """Task of this process. all: candles of venues to forecasts, in one process. ingest: candles
    of venues to Kafka. forecast: candles from Kafka to forecasts, as a member of a group that
    shares the series."""
    symbols: tuple[Annotated[WatchlistEntry, PlainValidator(_parse_entry)], ...] = ()
    """Symbols to forecast, as venue:symbol, separated by commas. binance:BTC/USDT is a spot
    market, binance:BTC/USDT:USDT a linear perpetual; binance:*/USDT?top=50 stands for the fifty
    most traded spot markets in USDT, looked up daily."""
    symbols_file: _Path | None = None
    """File with more symbols, one per line, # starts a comment. A symbol may be followed by
    timeframes of its own: binance:BTC/USDT 1m,1h. SIGHUP reads the file again."""
    timeframes: tuple[Annotated[Timeframe, PlainValidator(_parse_timeframe)], ...] = Field(
        default=(Timeframe(5, "m"),), min_length=1
    )
    """Timeframes, such as 1m,5m; every symbol is forecast in each of them."""
    sinks: tuple[str, ...] = ()
    """Installed sinks that forecasts are delivered to, separated by commas."""

    model: str = Field(default="NeoQuasar/Kronos-small", min_length=1)
    """Hub id or folder of the model, or nano, which is bundled."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if the model does not name its own."""
    model_revision: str | None = None
    """Commit of the model on the hub; default: the one that this version was tested with."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto chooses the fastest. Each of several, such as cuda:0,cuda:1,
    gets its own worker process."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the model; auto: bfloat16 on devices with native support, else float32."""
    threads: int = Field(default_factory=_default_threads, ge=1, le=1_024)
    """CPU threads of the model; default: usable cores minus one."""
    standby: bool = False
    """Keep a second worker process started, so that a broken one is replaced sooner; needs about
    280 MB."""
    max_context: int | None = Field(default=None, ge=8)
    """Maximum of lookback plus horizon, in bars; default: the context length of the model."""
    lookback: int = Field(default=488, ge=2)
    """Bars that a forecast is based on."""
    horizon: int = Field(default=24, ge=1)
    """Bars to forecast."""
    paths: int = Field(default=32, ge=1, le=10_000)
    """Sample paths per forecast."""
    temperature: float = Field(default=1.0, ge=1e-3)
    """Sampling temperature; below 1 narrows the bands, above 1 widens them."""
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """Sample from this many most likely tokens; 0: from all, 1: always the most likely one."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the most likely tokens that together have this probability."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Seed of sampling; the same bars and seed give the same forecast."""
    anchor: bool = True
    """Scale paths so that the last bar, as the model reproduces it, has its actual close."""
    quantiles: tuple[Annotated[float, AfterValidator(_validate_probability)], ...] = Field(
        default=(0.05, 0.25, 0.5, 0.75, 0.95), min_length=1
    )
    """Quantiles to publish, each between 0 and 1."""
    catch_up: Literal["newest", "all"] = "newest"
    """After falling behind: forecast only the newest bar of a series, or all in order."""
    degraded: Literal["forecast", "skip"] = "forecast"
    """If earlier bars are missing and cannot be fetched: make the forecast and mark it as
    degraded, or skip it."""
    batch_wait: float | None = Field(default=None, ge=0)
    """Seconds that a batch waits for bars with the same close; default: a quarter of the
    timeframe, at most 2."""
    batch_deadline: float | None = Field(default=None, gt=0)
    """Seconds for a batch, after which the worker is replaced; default: 0.8 of the timeframe,
    between 2 and 60."""
    state_file: _Path = Field(default_factory=_default_state_file)
    """File for bars, outcomes and undelivered messages, on a local disk; one daemon per file."""
    outbox_max_age: float = Field(default=86_400.0, gt=0)
    """Seconds after which an undelivered message is dropped."""
    login_refused: Literal["exit", "retry"] = "exit"
    """If a broker rejects the password or certificate at the start: exit with code 2, or retry.
    After the first successful login, it is always retried."""
    stop_grace: float = Field(default=20.0, ge=0)
    """Seconds to finish the current batch and deliver messages after SIGTERM."""
    secrets_dir: _Path = Path("/run/secrets")
    """Folder of files with secrets, named like variables: kronos_stream_kafka__sasl_password."""

    forecast: MessageSettings = Field(default_factory=MessageSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    options: dict[str, Any] = Field(default_factory=dict, exclude=True)
    """Options by connector; a connector without an entry uses its defaults."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        *_: object,
        **__: object,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @field_validator("device")
    @classmethod
    def _validate_device(cls, device: str) -> str:
        if not all(part.strip() for part in device.split(",")):
            raise ValueError("expected a device, or several with commas, such as cuda:0,cuda:1")
        return device

    @field_validator("symbols", "timeframes", "sinks", "quantiles")
    @classmethod
    def _validate_unique(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if repeated := [str(value) for i, value in enumerate(values) if value in values[:i]]:
            raise ValueError(f"{repeated[0]} is listed twice")
        return values

    @model_validator(mode="after")
    def _validate_conflicts(self) -> Self:
        problems = list(self._find_conflicts())
        if problems:
            raise SettingsError(problems)
        return self

    def watchlist(self) -> tuple[WatchlistEntry, ...]:
        """Symbols and their timeframes; reads the symbols file. Raises SettingsError."""
        entries = list(self.symbols)
        if self.symbols_file is not None:
            name = variable_name("symbols_file")
            more, problems = read_symbols_file(self.symbols_file, name, self.symbols)
            if problems:
                raise SettingsError(problems)
            entries += more
        if not entries:
            raise SettingsError(
                f"{variable_name('symbols')} and {variable_name('symbols_file')} name no symbols: "
                "set one of them, such as binance:BTC/USDT,binance:ETH/USDT"
            )
        return tuple(
            entry if entry.timeframes else entry._replace(timeframes=self.timeframes)
            for entry in entries
        )

    def series(self) -> tuple[Series, ...]:
        """Series of the watchlist, except those of patterns, which the venues resolve."""
        entries = [entry for entry in self.watchlist() if not entry.is_pattern]
        return tuple(series for entry in entries for series in entry.series())

    def candle_timeframes(self) -> tuple[Timeframe, ...]:
        """Timeframes of the bars that roles ingest and forecast exchange. Raises SettingsError."""
        if self.role == "forecast":
            return self.timeframes
        found = {length for entry in self.watchlist() for length in entry.timeframes}
        return tuple(sorted(found, key=str))

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices of the model, with one worker process each."""
        return tuple(device.strip() for device in self.device.split(","))

    def forecast_config(self) -> ForecastConfig:
        """Configuration of the model and of sampling."""
        return ForecastConfig(
            model=self.model,
            tokenizer=self.tokenizer,
            revision=self.model_revision,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            max_context=self.max_context,
            lookback=self.lookback,
            horizon=self.horizon,
            paths=self.paths,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            anchor=self.anchor,
            quantiles=self.quantiles,
            include_paths=self.forecast.paths,
        )

    def _find_conflicts(self) -> Iterator[str]:
        try:
            check_supported(self.quantiles, self.paths)
        except ValueError as error:
            remedy = f"change it, or raise {variable_name('paths')}"
            yield f"{variable_name('quantiles')}: {error}; {remedy}"
        bars = self.lookback + self.horizon
        if self.max_context is not None and bars > self.max_context:
            yield (
                f"{variable_name('lookback')}={self.lookback}: with {variable_name('horizon')}="
                f"{self.horizon} it exceeds {variable_name('max_context')}={self.max_context}; "
                "lower either"
            )
