"""What the daemon can be told, and what it does untold.

Every field is an environment variable: ``KRONOS_STREAM_`` and its name, upper case, parts joined
by ``__``. The attribute docstrings are the help of ``kronos-stream run``.
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
from kronos_stream.daemon.config.text_files import read_text_file
from kronos_stream.daemon.inference.protocol import ForecastConfig
from kronos_stream.forecast.outlook import PublishedPaths
from kronos_stream.forecast.quantiles import check_supported, required_paths
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe
from kronos_stream.market.watchlist import WatchlistEntry

ENV_PREFIX = "KRONOS_STREAM_"


class SettingsError(Exception):
    """Settings that cannot work: one line per problem, saying what it is and what to do."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


def variable_name(*path: str) -> str:
    """The environment variable of a field: ``("http", "port")`` → KRONOS_STREAM_HTTP__PORT."""
    return ENV_PREFIX + "__".join(path).upper()


def _parse_timeframe(value: object) -> Timeframe:
    return value if isinstance(value, Timeframe) else Timeframe.parse(str(value))


def _parse_entry(value: object) -> WatchlistEntry:
    return value if isinstance(value, WatchlistEntry) else WatchlistEntry.parse(str(value))


def _validate_probability(p: float) -> float:
    required_paths(p)
    return p


def _default_state_file() -> Path:
    """Where systemd says, else the user's own state; see the XDG base directories."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given) / "state.sqlite"
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "kronos-stream" / "state.sqlite"


def _default_threads() -> int:
    """One core is left to the daemon itself."""
    return max(1, usable_cores() - 1)


_MAX_LINE_LENGTH = 400
"""Characters of a line of the symbols file."""
_MAX_PROBLEMS = 20
"""That are told of one file."""

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
    """What goes into a forecast's message beside the bands."""

    model_config = _CONFIG

    paths: PublishedPaths = "none"
    """Of the sample paths themselves: none, their closes, or all channels (ohlcva)."""


class HttpSettings(BaseModel):
    """Where /metrics, /series, /forecasts, /readyz and /healthz are served."""

    model_config = _CONFIG

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all. Without a token, only /metrics, /readyz and
    /healthz are then shown, but neither /series nor /forecasts."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """Port to listen on; 0 takes any that is free."""
    token: SecretStr | None = None
    """Whoever asks must show it: Authorization: Bearer. /readyz and /healthz never need it."""

    @field_validator("token")
    @classmethod
    def _validate_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token and not re.fullmatch(r"[\w.~+/=-]{16,}", token.get_secret_value(), re.ASCII):
            raise ValueError("expected at least 16 of the characters A-Z a-z 0-9 . _ ~ + / = -")
        return token


class LogSettings(BaseModel):
    """What is logged, on stderr."""

    model_config = _CONFIG

    format: Literal["console", "json"] = "console"
    """Lines for people, or one JSON object per line."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""


class Settings(BaseSettings):
    """All settings of the daemon; those of its connectors in ``options``, by connector.

    Made of keywords alone; what is in the environment, ``read_settings`` passes by them.
    """

    model_config = _CONFIG

    role: Literal["all", "ingest", "forecast"] = "all"
    """What this process does. all: everything, without a broker. ingest: candles of venues to
    Kafka. forecast: candles from Kafka to forecasts, as one of a group that shares the work."""
    symbols: tuple[Annotated[WatchlistEntry, PlainValidator(_parse_entry)], ...] = ()
    """What to forecast: venue:symbol, a comma list. binance:BTC/USDT is spot,
    binance:BTC/USDT:USDT the linear perpetual, binance:*/USDT?top=50 the fifty most traded of
    those, looked up daily."""
    symbols_file: _Path | None = None
    """A file with more of them, one per line, # for comments; a line may name its timeframes
    behind the symbol: binance:BTC/USDT 1m,1h. Read again on SIGHUP."""
    timeframes: tuple[Annotated[Timeframe, PlainValidator(_parse_timeframe)], ...] = Field(
        default=(Timeframe(5, "m"),), min_length=1
    )
    """Lengths of bars, such as 1m,5m; every symbol is forecast in each."""
    sinks: tuple[str, ...] = ()
    """Where forecasts go: a comma list of installed sinks."""

    model: str = Field(default="NeoQuasar/Kronos-small", min_length=1)
    """Hub id, folder, or nano, the bundled one."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where the model does not know its own."""
    model_revision: str | None = None
    """Commit of the model on the hub; else the one this version was tested with."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the fastest. Several, such as cuda:0,cuda:1, get a
    worker each."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the device multiplies it natively."""
    threads: int = Field(default_factory=_default_threads, ge=1, le=1_024)
    """CPU threads of the model; one less than the cores we may use."""
    standby: bool = False
    """Keep a second worker process started, so that a broken one is replaced sooner; it takes some
    280 MB."""
    max_context: int | None = Field(default=None, ge=8)
    """Bars the model may see, lookback and horizon together; else what it was trained on."""
    lookback: int = Field(default=488, ge=2)
    """Bars a forecast starts from."""
    horizon: int = Field(default=24, ge=1)
    """Bars to forecast."""
    paths: int = Field(default=32, ge=1, le=10_000)
    """Sample paths per forecast."""
    temperature: float = Field(default=1.0, ge=1e-3)
    """Of sampling; below 1 narrower bands, above 1 wider."""
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """Tokens that compete; 0: all, 1: always the likeliest."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Share of the probability that competes."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Fixes the noise; the same bars and seed give the same forecast."""
    anchor: bool = True
    """Scale paths so that the model's view of the last bar closes where it did."""
    quantiles: tuple[Annotated[float, AfterValidator(_validate_probability)], ...] = Field(
        default=(0.05, 0.25, 0.5, 0.75, 0.95), min_length=1
    )
    """Quantiles to publish, between 0 and 1."""
    catch_up: Literal["newest", "all"] = "newest"
    """After falling behind: forecast the newest bar and skip the others, or all in order."""
    degraded: Literal["forecast", "skip"] = "forecast"
    """What becomes of a bar while bars before it cannot be had: forecast and marked, or
    skipped."""
    batch_wait: float | None = Field(default=None, ge=0)
    """Seconds that a batch waits for bars of the same close; else a quarter of the timeframe, at
    most 2."""
    batch_deadline: float | None = Field(default=None, gt=0)
    """Seconds for a batch before the worker is replaced; else 0.8 of the timeframe, between 2 and
    60."""
    state_file: _Path = Field(default_factory=_default_state_file)
    """Bars, outcomes and undelivered messages, on a local disk; one daemon per file."""
    outbox_max_age: float = Field(default=86_400.0, gt=0)
    """Seconds after which an undelivered message is given up."""
    login_refused: Literal["exit", "retry"] = "exit"
    """Where a broker does not let us in at the start, for a password or a certificate: exit, with
    code 2, or try again. Once we were in, it is always tried again."""
    stop_grace: float = Field(default=20.0, ge=0)
    """Seconds to finish and deliver after SIGTERM."""
    secrets_dir: _Path = Path("/run/secrets")
    """Folder of files named like variables, such as kronos_stream_kafka__sasl_password."""

    forecast: MessageSettings = Field(default_factory=MessageSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    options: dict[str, Any] = Field(default_factory=dict, exclude=True)
    """What connectors were told, by name; those missing here take their defaults."""

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
        if twice := [str(value) for i, value in enumerate(values) if value in values[:i]]:
            raise ValueError(f"{twice[0]} stands there twice")
        return values

    @model_validator(mode="after")
    def _validate_conflicts(self) -> Self:
        problems = list(self._find_conflicts())
        if problems:
            raise SettingsError(problems)
        return self

    def watchlist(self) -> tuple[WatchlistEntry, ...]:
        """What to forecast, in which timeframes; reads the symbols file. Raises SettingsError."""
        entries = [*self.symbols, *self._read_symbols_file()]
        if not entries:
            raise SettingsError(
                f"{variable_name('symbols')} and {variable_name('symbols_file')} name nothing: set one to "
                "what to forecast, such as binance:BTC/USDT,binance:ETH/USDT"
            )
        return tuple(
            entry if entry.timeframes else entry._replace(timeframes=self.timeframes)
            for entry in entries
        )

    def series(self) -> tuple[Series, ...]:
        """Those of the watchlist's symbols; its patterns are the venues' to resolve."""
        named = [entry for entry in self.watchlist() if not entry.is_pattern]
        return tuple(series for entry in named for series in entry.series())

    def candle_timeframes(self) -> tuple[Timeframe, ...]:
        """Of the bars that go from role to role: all that is followed, or that is read.

        Raises SettingsError.
        """
        if self.role == "forecast":
            return self.timeframes
        found = {length for entry in self.watchlist() for length in entry.timeframes}
        return tuple(sorted(found, key=str))

    @property
    def devices(self) -> tuple[str, ...]:
        """Where to compute: one worker each."""
        return tuple(device.strip() for device in self.device.split(","))

    def forecast_config(self) -> ForecastConfig:
        """What the worker is to draw."""
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

    def _read_symbols_file(self) -> Sequence[WatchlistEntry]:
        if self.symbols_file is None:
            return ()
        name = variable_name("symbols_file")
        try:
            lines = read_text_file(self.symbols_file, "utf-8-sig").splitlines()
        except ValueError as error:
            raise SettingsError(f"{name}={self.symbols_file}: {error}") from None
        entries: list[WatchlistEntry] = []
        problems = []
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            try:
                if len(text) > _MAX_LINE_LENGTH:
                    raise ValueError(f"{text[:80]!r}… is too long: {len(text):,} characters")  # noqa: TRY301
                entry = WatchlistEntry.parse(text)
                if any(entry[:2] == other[:2] for other in (*self.symbols, *entries)):
                    raise ValueError(f"{text} stands there twice")  # noqa: TRY301
                entries.append(entry)
            except ValueError as error:
                problems.append(f"{name}={self.symbols_file}, line {number}: {error}")
        if len(problems) > _MAX_PROBLEMS:
            more = f"{name}={self.symbols_file}: and {len(problems) - _MAX_PROBLEMS:,} more lines"
            problems = [*problems[:_MAX_PROBLEMS], more]
        if problems:
            raise SettingsError(problems)
        return entries

    def _find_conflicts(self) -> Iterator[str]:
        try:
            check_supported(self.quantiles, self.paths)
        except ValueError as error:
            yield f"{variable_name('quantiles')}: {error}; change it, or raise {variable_name('paths')}"
        bars = self.lookback + self.horizon
        if self.max_context is not None and bars > self.max_context:
            yield (
                f"{variable_name('lookback')}={self.lookback}: with {variable_name('horizon')}="
                f"{self.horizon} it exceeds {variable_name('max_context')}={self.max_context}; lower "
                "either"
            )
