"""Settings from the environment, and error messages of one line each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kronos_stream.cli import main
from kronos_stream.daemon.config.environment import read_options, read_settings
from kronos_stream.daemon.config.settings import ENV_PREFIX, Settings, SettingsError
from kronos_stream.interfaces import plugins

_ACME = """
from pydantic import BaseModel, Field, SecretStr, model_validator
from kronos_stream.interfaces.sink import SinkConnector
from kronos_stream.interfaces.source import SourceConnector

class Hours(BaseModel):
    days: tuple[str, ...] = ("mon", "fri")
    opens: int = 9

class Market(BaseModel):
    url: str = "wss://acme.example"
    boards: tuple[int, ...] = (1,)
    hours: Hours = Hours()

class Post(BaseModel):
    address: str = Field(examples=["Main Street 1"])
    password: SecretStr = SecretStr("")
    weight: float = 1.0

    @model_validator(mode="after")
    def check(self):
        if self.weight > 100:
            raise ValueError("weight exceeds the limit of a letter")
        return self

def build(*args):
    return None

SOURCE = SourceConnector(Market, build, lambda: ("acme_west",))
SINK = SinkConnector(Post, build)
"""

_POINTS = """
[kronos_stream.sources]
acme = acme_exchange:SOURCE
lost = acme_missing:SOURCE
[kronos_stream.sinks]
post = acme_exchange:SINK
upside = acme_exchange:SOURCE
"""

_GIVEN = "given"
_BASE = {"SYMBOLS": "acme:BTC/USDT", "SINKS": "post", "POST__ADDRESS": "Main Street 1"}


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package with a source and a sink, as a user would."""
    (tmp_path / "acme_exchange.py").write_text(_ACME)
    info = tmp_path / "acme_exchange-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-exchange\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._entry_points.cache_clear()
    yield
    plugins._entry_points.cache_clear()


def _read(given: dict[str, str], *, base: bool = True) -> Settings:
    # /run/secrets of this machine must not influence tests.
    own = {"SECRETS_DIR": "/nowhere", **(_BASE if base else {}), **given}
    return read_settings({ENV_PREFIX + name: value for name, value in own.items()})


def test_defaults() -> None:
    settings = _read({})
    assert [series.name for series in settings.series()] == ["acme:BTC/USDT:5m"]
    config = settings.forecast_config()
    assert (config.model, config.lookback, config.horizon) == ("NeoQuasar/Kronos-small", 488, 24)
    assert (config.paths, config.temperature, config.top_k, config.top_p) == (32, 1.0, 0, 0.9)
    assert config.anchor
    assert config.quantiles == (0.05, 0.25, 0.5, 0.75, 0.95)
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8080)
    assert settings.catch_up == "newest"


def test_values_are_parsed() -> None:
    settings = _read(
        {
            "SYMBOLS": "acme:BTC/USDT, acme:BTC/USDT:USDT,acme:X:Y:Z",
            "TIMEFRAMES": "1m,4h",
            "QUANTILES": "0.1,0.9",
            "PATHS": "20",
            "ANCHOR": "false",
            "CATCH_UP": "all",
            "STATE_FILE": "/data/x.sqlite",
            "HTTP__PORT": "0",
            "LOG__FORMAT": "json",
            "TOKENIZER": "",
            "ACME__BOARDS": "1,2,3",
            "ACME__HOURS__DAYS": "sat,sun",
        }
    )
    assert [series.name for series in settings.series()] == [
        "acme:BTC/USDT:1m",
        "acme:BTC/USDT:4h",
        "acme:BTC/USDT:USDT:1m",
        "acme:BTC/USDT:USDT:4h",
        "acme:X:Y:Z:1m",
        "acme:X:Y:Z:4h",
    ]
    assert settings.series()[2].symbol == "BTC/USDT:USDT"
    assert settings.quantiles == (0.1, 0.9)
    assert not settings.forecast_config().anchor
    assert settings.tokenizer is None
    assert settings.state_file == Path("/data/x.sqlite")
    assert settings.log.format == "json"
    assert settings.options["acme"].boards == (1, 2, 3)
    assert settings.options["acme"].hours.days == ("sat", "sun")
    assert settings.options["acme"].hours.opens == 9
    assert settings.options["post"].address == "Main Street 1"


@pytest.mark.parametrize(
    ("given", "variable", "cure"),
    [
        ({"SYMBOLS": ""}, "SYMBOLS", "set one of them, such as"),
        ({"SYMBOLS": "BTC/USDT"}, "SYMBOLS", "expected venue:symbol"),
        ({"SYMBOLS": "acme:"}, "SYMBOLS", "expected venue:symbol"),
        ({"SYMBOLS": "acme:BTC/USDT:5m"}, "SYMBOLS", "each of KRONOS_STREAM_TIMEFRAMES"),
        ({"SYMBOLS": "acme:A,acme:B,acme:A"}, "SYMBOLS", "acme:A is listed twice"),
        ({"SYMBOLS": "nyse:IBM"}, "SYMBOLS", "and every exchange of acme, such as acme_west"),
        ({"SYMBOLS": "lost:IBM"}, "SYMBOLS", "acme_missing:SOURCE cannot be loaded"),
        ({"TIMEFRAMES": "5 min"}, "TIMEFRAMES", "expected a count and a unit"),
        ({"TIMEFRAMES": "5m,1m,5m"}, "TIMEFRAMES", "5m is listed twice"),
        ({"TIMEFRAMES": ","}, "TIMEFRAMES", "at least 1 item"),
        ({"SINKS": ""}, "SINKS", "would go nowhere: set it to any of"),
        ({"SINKS": "carrier_pigeon"}, "SINKS", "none of the sinks is called 'carrier_pigeon'"),
        ({"SINKS": "post,post"}, "SINKS", "post is listed twice"),
        ({"SINKS": "upside"}, "SINKS", "acme_exchange:SOURCE is not a SinkConnector"),
        ({"ROLE": "chef"}, "ROLE", "should be 'all'"),
        ({"CATCH_UP": "some"}, "CATCH_UP", "should be 'newest' or 'all'"),
        ({"DEGRADED": "maybe"}, "DEGRADED", "should be 'forecast' or 'skip'"),
        ({"PATHS": "many"}, "PATHS", "=many: expected a whole number"),
        ({"PATHS": "18"}, "QUANTILES", "needs at least 19 paths, not 18"),
        ({"QUANTILES": "0.001"}, "QUANTILES", "needs at least 999 paths, not 32"),
        ({"QUANTILES": "0.5,1"}, "QUANTILES", "not between 0 and 1"),
        ({"QUANTILES": "0.5,0.5"}, "QUANTILES", "0.5 is listed twice"),
        ({"LOOKBACK": "1"}, "LOOKBACK", "greater than or equal to 2"),
        ({"HORIZON": "0"}, "HORIZON", "greater than or equal to 1"),
        ({"MAX_CONTEXT": "511"}, "LOOKBACK", "exceeds KRONOS_STREAM_MAX_CONTEXT=511"),
        ({"TEMPERATURE": "0"}, "TEMPERATURE", "greater than or equal to 0.001"),
        ({"TEMPERATURE": "inf"}, "TEMPERATURE", "finite number"),
        ({"TOP_P": "1.5"}, "TOP_P", "less than or equal to 1"),
        ({"ANCHOR": "perhaps"}, "ANCHOR", "=perhaps: expected true or false"),
        ({"DTYPE": "float16"}, "DTYPE", "should be 'auto', 'float32' or 'bfloat16'"),
        ({"THREADS": "0"}, "THREADS", "greater than or equal to 1"),
        ({"HTTP__PORT": "65536"}, "HTTP__PORT", "less than or equal to 65535"),
        ({"LOG__LEVEL": "loud"}, "LOG__LEVEL", "should be 'debug', 'info', 'warning' or 'error'"),
        ({"SYMBOLS_FILE": "/no/such/file"}, "SYMBOLS_FILE", "No such file or directory"),
        ({"SYMBOL": "acme:A"}, "SYMBOL", "did you mean KRONOS_STREAM_SYMBOLS?"),
        ({"HTTP_PORT": "1"}, "HTTP_PORT", "did you mean KRONOS_STREAM_HTTP__PORT?"),
        ({"POST__ADRESS": "x"}, "POST__ADRESS", "did you mean KRONOS_STREAM_POST__ADDRESS?"),
        ({"POST__ADDRESS": ""}, "POST__ADDRESS", "is required: set it, such as Main Street 1"),
        ({"POST__WEIGHT": "heavy"}, "POST__WEIGHT", ": expected a number"),
        ({"ACME__HOURS__OPENS": "noon"}, "ACME__HOURS__OPENS", "expected a whole number"),
        ({"POST__WEIGHT": "101"}, "POST__*", "limit of a letter"),
        ({"POST__PASSWORD_FILE": "/no/such"}, "POST__PASSWORD_FILE", "No such file"),
        ({"PORT": "8080"}, "PORT", "there is no such setting"),
        ({"WIBBLE": "1"}, "WIBBLE", "kronos-stream run --help lists them"),
        ({"lookback": "96"}, "lookback", "did you mean KRONOS_STREAM_LOOKBACK?"),
        ({"OPTIONS": "{}"}, "OPTIONS", "there is no such setting"),
        ({"NOSUCH__URL": "x"}, "NOSUCH__URL", "there is no such setting"),
    ],
)
def test_error_names_variable_and_remedy_in_one_line(
    given: dict[str, str], variable: str, cure: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        _read(given)
    (problem,) = raised.value.problems
    assert problem.startswith(ENV_PREFIX + variable)
    assert problem[len(ENV_PREFIX + variable)] in ":= "
    assert cure in problem
    assert "\n" not in problem
    assert str(raised.value) == problem


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(SettingsError) as raised:
        _read({"PATHS": "no", "LOOKBACK": "no", "LOG__LEVEL": "no"})
    assert len(raised.value.problems) == 3
    with pytest.raises(SettingsError) as raised:
        _read({"SINKS": "", "SYMBOLS": ""})
    assert len(raised.value.problems) == 2


def test_command_prints_one_line_per_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SECRETS_DIR": "/nowhere", "PATHS": "no", "SEED": "no"}.items():
        monkeypatch.setenv(ENV_PREFIX + name, value)
    with pytest.raises(SystemExit) as exited:
        main(["run"])
    assert exited.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        f"kronos-stream: error: {ENV_PREFIX}{name}" for name in ("PATHS", "SEED")
    ]


def test_variables_injected_by_kubernetes_are_ignored() -> None:
    host = "10.0.0.1"
    _read(
        {
            "SERVICE_HOST": host,
            "SERVICE_PORT": "8080",
            "SERVICE_PORT_HTTP": "8080",
            "PORT": f"tcp://{host}:8080",
            "PORT_8080_TCP": f"tcp://{host}:8080",
            "PORT_8080_TCP_PROTO": "tcp",
            "PORT_8080_TCP_PORT": "8080",
            "PORT_8080_TCP_ADDR": host,
            "METRICS_SERVICE_HOST": host,
            "METRICS_SERVICE_PORT": "9090",
            "METRICS_PORT": f"tcp://{host}:9090",
            "METRICS_PORT_9090_TCP_ADDR": host,
        }
    )


def test_variables_of_other_programs_are_ignored() -> None:
    read_settings(
        {"KRONOS_STREAMS": "x", "PATHS": "x", ENV_PREFIX + "SECRETS_DIR": "/nowhere"} | _full()
    )


def test_keyword_arguments_ignore_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENV_PREFIX + "PATHS", "many")
    monkeypatch.setenv(ENV_PREFIX + "SEED", "7")
    assert Settings(seed=1).seed == 1
    assert Settings().seed == 0
    assert _read({}).seed == 0


def test_secrets_are_read_from_files_unless_the_variable_is_set(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("from file \n")
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "unrelated").write_bytes(b"\xff")

    def password(**given: str) -> str:
        found: str = _read(given).options["post"].password.get_secret_value()
        return found

    assert password(POST__PASSWORD_FILE=str(file)) == "from file "
    assert password(POST__PASSWORD_FILE=str(file), POST__PASSWORD=_GIVEN) == _GIVEN
    (folder / "kronos_stream_post__password").write_text("from folder\n")
    assert password(SECRETS_DIR=str(folder)) == "from folder"
    assert password(SECRETS_DIR=str(folder), POST__PASSWORD=_GIVEN) == _GIVEN
    (folder / "kronos_stream_post__pasword").write_text("x")
    with pytest.raises(SettingsError, match=r"did you mean KRONOS_STREAM_POST__PASSWORD\?"):
        password(SECRETS_DIR=str(folder))


def test_secrets_never_appear_in_errors(tmp_path: Path) -> None:
    secret = "h3r-m4j3sty"  # noqa: S105 - what must not be seen
    shown = repr(_read({"POST__PASSWORD": secret})) + str(_read({"POST__PASSWORD": secret}))
    file = tmp_path / "secret"
    file.write_bytes(secret.encode() + b"\xff")
    for bad in (
        {"POST__PASSWORD": secret, "POST__WEIGHT": "1000"},
        {"POST__WEIGHT": secret},
        {"POST__PASWORD": secret},
        {"POST__PASSWORD_FILE": str(file)},
    ):
        with pytest.raises(SettingsError) as raised:
            _read(bad)
        shown += str(raised.value) + repr(raised.value.__cause__)
    assert secret not in shown


def test_pipe_in_place_of_a_file_is_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = str(tmp_path / "pipe")
    for name in ("SYMBOLS_FILE", "POST__PASSWORD_FILE"):
        with pytest.raises(SettingsError, match="not a regular file"):
            _read({name: pipe})


def test_default_state_file_is_in_the_state_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/state")
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert _read({}).state_file == Path("/home/me/state/kronos-stream/state.sqlite")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/kronos-stream:/var/lib/more")
    assert _read({}).state_file == Path("/var/lib/kronos-stream/state.sqlite")
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert _read({}).state_file == Path("/home/me/.local/state/kronos-stream/state.sqlite")
    assert _read({"STATE_FILE": "~/x"}).state_file == Path("/home/me/x")


def test_options_of_one_connector_can_be_read_alone() -> None:
    assert read_options("post", _full()).address == "Main Street 1"
    with pytest.raises(SettingsError, match="POST__ADDRESS is required"):
        read_options("post", {ENV_PREFIX + "SECRETS_DIR": "/nowhere"})


def _full() -> dict[str, str]:
    return {ENV_PREFIX + name: value for name, value in _BASE.items()}
