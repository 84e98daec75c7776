"""Secrets never appear in output, logs, pages and files of the real commands."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import orjson
import pytest

from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.redaction import Redactor, config_secrets
from tests.support.daemon_process import DaemonProcess
from tests.support.mosquitto import Mosquitto
from tests.support.processes import COMMAND, http_get, settings_environment, wait_for

MARKS = {
    name: f"{name}-Mark'\"\\5eCr3t" for name in ("sasl", "mqtt", "key", "ccxt", "phrase", "hub")
}
TOKEN = "token-Mark-5eCr3t-0123456789"  # noqa: S105 - of this test alone
PATH_MARK, QUERY_MARK = "PathMark5eCr3t", "QueryMark5eCr3t"
ALL = (*MARKS.values(), TOKEN, PATH_MARK, QUERY_MARK)


def _assert_no_secrets(text: str) -> None:
    """Check that a text has no secrets, also not in the notation of JSON or Python."""
    for mark in ALL:
        for one in (mark, json.dumps(mark)[1:-1], repr(mark)[1:-1]):
            assert one not in text, f"{mark} in {text}"
    assert "5eCr3t" not in text, text  # nor in part


@pytest.fixture
def unused_address() -> str:
    """An address without a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def secret_settings(unused_address: str, tmp_path: Path) -> dict[str, str]:
    """Settings with a secret in every place that can hold one."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "kronos_stream_http__token").write_text(TOKEN + "\n", "utf-8")
    (tmp_path / "password").write_text(MARKS["mqtt"] + "\n", "utf-8")
    urls = {"public": f"http://{unused_address}/{PATH_MARK}/api?who={QUERY_MARK}"}
    exchange = {
        "apiKey": MARKS["key"],
        "secret": MARKS["ccxt"],
        "password": MARKS["phrase"],
        "urls": {"api": urls},
        "options": {"fetchMarkets": {"types": ["spot"]}},
    }
    return {
        "SYMBOLS": "ccxt.binance:BTC/USDT",
        "TIMEFRAMES": "1m",
        "SINKS": "kafka,mqtt",
        "KAFKA__BOOTSTRAP_SERVERS": unused_address,
        "KAFKA__SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA__SASL_USERNAME": "me",
        "KAFKA__SASL_PASSWORD": MARKS["sasl"],
        "MQTT__URL": f"mqtt://{unused_address}",
        "MQTT__USERNAME": "me",
        "MQTT__PASSWORD_FILE": str(tmp_path / "password"),
        "CCXT__CONFIG": orjson.dumps({"binance": exchange}).decode(),
        "SECRETS_DIR": str(folder),
        "MODEL": "nano",
        "LOOKBACK": "96",
        "HORIZON": "8",
        "LOG__LEVEL": "debug",
    }


def _run_output(given: Mapping[str, str], *arguments: str) -> str:
    ended = subprocess.run(
        [*COMMAND, *arguments],
        env=settings_environment(given), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("form", ["console", "json"])
def test_daemon_logs_and_serves_no_secrets(
    form: str,
    secret_settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No service is reachable, so that it logs errors about all of them, at level debug."""
    monkeypatch.setenv("HF_TOKEN", MARKS["hub"])
    with DaemonProcess(tmp_path, secret_settings | {"LOG__FORMAT": form}) as daemon:
        daemon.start()

        def log() -> str:
            return daemon.log_file.read_text("utf-8")

        words = ("no mqtt broker", "connection refused", "venue does not answer yet")
        wait_for("all errors are logged", lambda: all(word in log() for word in words))
        if form == "json":
            status, checks = daemon.readiness()
            assert status == 503
            assert "***" in checks["source ccxt.binance"]  # of the address, its path
            _assert_no_secrets(str(checks))
            assert http_get(f"http://127.0.0.1:{daemon._port}/metrics")[0] == 401
        worker = daemon.worker_pid()
        if worker is not None:
            _assert_no_secrets(
                Path(f"/proc/{worker}/environ").read_text("utf-8").replace(MARKS["hub"], "")
            )
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        _assert_no_secrets(log())
        for file in tmp_path.glob("state.sqlite*"):
            _assert_no_secrets(file.read_text("latin-1"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--skip", "model"),
        ("doctor", "--skip", "model", "--json"),
        ("topics", "check"),
        ("tail", "--json"),
        ("run", "--check"),
        ("run", "--help"),
    ],
    ids=" ".join,
)
def test_commands_print_no_secrets(
    arguments: tuple[str, ...], secret_settings: dict[str, str]
) -> None:
    output = _run_output(secret_settings, *arguments)
    assert output
    _assert_no_secrets(output)
    if arguments[0] == "doctor":
        for name in ("HTTP__TOKEN", "KAFKA__SASL_PASSWORD", "MQTT__PASSWORD", "CCXT__CONFIG"):
            assert f"{name}=***" in output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MQTT__URL", f"mqtt://me:{PATH_MARK}@127.0.0.1"),
        ("KAFKA__BOOTSTRAP_SERVERS", f"me:{PATH_MARK}@127.0.0.1:9092"),
        ("BINANCE__REST_URL", f"https://me:{PATH_MARK}@127.0.0.1"),
        ("CCXT__CONFIG", f'{{"binance": {{"apiKey": "{PATH_MARK}"'),
        ("CCXT__CONFIG", f'{{"binance": {{"rateLimit": "{PATH_MARK}"}}}}'),
        ("CCXT__CONFIG", f'{{"binance": {{"apiKey": ["{PATH_MARK}"]}}}}'),
        ("CCXT__CONFIG", f'{{"binance": "{PATH_MARK}"}}'),
        ("HTTP__TOKEN", f"{PATH_MARK} {PATH_MARK}"),
        ("KAFKA__PARTITIONS", "many"),
    ],
)
def test_errors_of_settings_have_no_secrets(
    name: str, value: str, secret_settings: dict[str, str]
) -> None:
    symbols = "binance:BTC/USDT" if name.startswith("BINANCE") else secret_settings["SYMBOLS"]
    output = _run_output(secret_settings | {name: value, "SYMBOLS": symbols}, "run", "--check")
    assert output.startswith("kronos-stream: error: ")
    assert f"KRONOS_STREAM_{name}" in output or "https://me:***@127.0.0.1" in output
    _assert_no_secrets(output)


def test_errors_of_refused_logins_have_no_secrets(
    make_mosquitto: Callable[..., Mosquitto],
    secret_settings: dict[str, str],
    tmp_path: Path,
) -> None:
    """A real broker receives the password; the log has level debug."""
    with make_mosquitto(users={"me": "another"}) as broker:
        given = secret_settings | {"SINKS": "mqtt", "MQTT__URL": broker.url}
        with DaemonProcess(tmp_path, given) as daemon:
            daemon.start()
            assert daemon.wait() == 2
            log = daemon.log_file.read_text("utf-8")
    (line,) = (line for line in log.splitlines() if line.startswith("kronos-stream: error: "))
    assert "see KRONOS_STREAM_MQTT__USERNAME and KRONOS_STREAM_MQTT__PASSWORD" in line
    assert "Traceback" not in log
    _assert_no_secrets(log)


def test_settings_objects_show_no_secrets(secret_settings: dict[str, str]) -> None:
    settings = read_settings(
        {f"KRONOS_STREAM_{k}": v for k, v in secret_settings.items()} | {"HF_TOKEN": MARKS["hub"]}
    )
    for one in (settings, *settings.options.values()):
        for text in (
            repr(one),
            str(one),
            one.model_dump_json(warnings=False),
            str(one.model_dump(warnings=False)),
        ):
            _assert_no_secrets(text)


@pytest.mark.parametrize("form", ["console", "json"])
def test_tracebacks_show_no_local_variables(form: str) -> None:
    """Log lines mask secrets that they are given by mistake."""
    code = f"""
import structlog
from kronos_stream.daemon.telemetry.logs import configure
from kronos_stream.redaction import register_secrets
secret = {MARKS["sasl"]!r}
register_secrets(secret)
configure({form!r}, "debug")
log = structlog.get_logger()
def connect(password):
    raise ValueError("login as me with " + password)
try:
    connect(secret)
except ValueError:
    log.exception("failed", given={{"password": secret}}, why=secret)
hidden_from_nobody = "LocalMark" + "5eCr3t"
try:
    raise KeyError("x")
except KeyError:
    log.exception("failed again")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "login as me with ***" in ended.stderr
    assert "failed again" in ended.stderr
    _assert_no_secrets(ended.stderr)


def test_errors_of_exchanges_have_no_secrets() -> None:
    config = {
        "apiKey": "A" * 20,
        "options": {"defaultType": "future", "brokerToken": "tokentoken"},
        "headers": {"X-Some": "headervalue"},
        "httpsProxy": "http://user:proxypass@proxy.example:3128",
        "urls": {"api": "https://{hostname}/pathsecret/v1?sig=querysecret", "www": "https://x.y"},
    }
    hidden = Redactor(config_secrets(config))
    output = (
        "future https://x.y https://real.host/pathsecret/v1?sig=querysecret headervalue "
        "tokentoken proxypass at proxy.example " + "A" * 20
    )
    left = hidden.redact(output)
    assert left == (
        "future https://x.y https://real.host/***/v1?sig=*** *** *** *** at proxy.example ***"
    )


def test_error_of_a_symbols_file_is_short(tmp_path: Path) -> None:
    symbols = tmp_path / "symbols"
    given = {"SYMBOLS_FILE": str(symbols), "SINKS": "jsonl", "JSONL__PATH": str(tmp_path / "f")}
    symbols.write_text("x" * 1_000_000, "utf-8")
    output = _run_output(given, "run", "--check")
    assert "is too long: 1,000,000 characters" in output
    assert len(output) < 500
    symbols.write_text("nonsense\n" * 20_000, "utf-8")
    output = _run_output(given, "run", "--check")
    assert len(output.splitlines()) == 21
    assert "and 19,980 more lines" in output
