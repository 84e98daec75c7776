"""Code blocks of README and docs/ work: commands, programs, settings and messages.

Every fenced block is either run here, or listed below with the reason why it is not. A block that
is neither fails a test, so that new blocks cannot be overlooked.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from confluent_kafka import Producer
from jsonschema import Draft202012Validator

from kronos_connectors.kafka.topics import forecast_topic as topic_of
from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.forecast import contract
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.testing.broker import EmbeddedBroker
from kronos_stream.testing.market import Market
from tests.support.documentation import (
    BLOCKS,
    ENVIRONMENTS,
    MESSAGES,
    PAGES,
    PROGRAMS,
    QUERIES,
    SETTINGS,
    SHELL,
    Block,
    check_command,
    is_setting,
    shell_commands,
)
from tests.support.mosquitto import Mosquitto
from tests.support.paths import ROOT
from tests.support.processes import WAIT_SECONDS, wait_for

# Blocks that are neither commands nor programs: start of the block → description.
ILLUSTRATIONS = {
    "exchange ──frames──▶ connector": "a drawing",
    "venues ──▶ ingest ──▶": "a drawing",
    "ok    state file:": "output of doctor, shortened; tests/system/test_doctor.py",
    "# values.yaml": "values of the chart; tests/deploy/test_helm_chart.py",
    "secrets:\n": "values of the chart; tests/deploy/test_helm_chart.py",
    "mode: split\n": "values of the chart; tests/deploy/test_helm_chart.py",
    "Status: ": "output of systemctl; tests/system/test_systemd_notify.py",
    "[Service]\n": "an addition to the unit; tests/deploy/test_systemd.py",
    "security.protocol=": "login of kafka-acls.sh: Kafka's own",
    "35 forecasts of 5 series": "output of the demo, shortened; tests/system/test_demo.py",
}
SYMBOLS = "binance:BTC/USDT                  # spot"
MOSQUITTO = "persistence true"

# Commands whose options are checked but which do not run here: pattern → test that runs them, or
# the reason why there is none.
ELSEWHERE = {
    r"make deploy-check|(helm|kubectl) .*": "tests/deploy/test_helm_chart.py",
    r"docker compose .*": "tests/deploy/test_compose.py",
    r"make image.*|docker (run|build) .*": "tests/deploy/test_image_built.py",
    r"docker (tag|push) .*": "Docker's own",
    r"build/deploy/helm template .* --values values.yaml": "tests/deploy/test_helm_chart.py",
    r"git (fetch --tags|checkout v.*)|rm -rf dist": "git's own",
    r"/opt/kronos-stream/bin/pip wheel .*": "tests/deploy/test_wheel.py builds one",
    r"make (sbom|audit)": ".ci/run makes the SBOM; the audit asks PyPI",
    r"set -a; \. \./(ingest|forecast)\.env; set \+a": "the files are ENVIRONMENTS",
    r"kafka-consumer-groups\.sh .*": "Kafka's own",
    r"kafka-acls\.sh .*": "tests/system/test_daemon_security.py",
    r"make demo.*": "tests/system/test_demo.py",
    r"make test.*|make lint": ".ci/run",
    r"make( format| parity-hub| soak| bench)?": "for developers",
    r"\. \.venv/bin/activate": "this test runs in an environment",
    r"kronos-stream run( --check)?": "tests/system/test_shutdown.py",
    r"(sudo|sudoedit|systemctl|journalctl|systemd-ask-password) .*": "tests/deploy/test_systemd.py",
    r"kronos-stream topics (create|check).*": "tests/integration/kafka/test_kafka_topics.py",
    r"kronos-stream tail.*": "tests/integration/kafka/test_tail.py",
    r"kronos-stream doctor.*": "tests/system/test_doctor.py",
    r"curl -s localhost:8080/.*": "tests/deploy/test_monitoring.py",
    r"kronos-stream train .* --init NeoQuasar/.*": "needs the model hub; tests/unit/training",
    r"python docs/examples/.*": "tests/system/test_examples.py",
    r"(cp|freqtrade) .*": "tests/system/test_examples.py",
    r"echo 'kafka:.*' \| kcat .*": "tests/system/test_kafka_candles.py",
}

# Commands that run here → options to add, so that they end soon.
HERE = {
    r"kronos-stream forecast .*": "",
    r"kronos-stream (replay|run|train|bench) (.* )?--help": "",
    r"kronos-stream bench --models mini .*": "--repeats 1",
    r"kronos-stream train (tokenizer|predictor) btc.csv eth.parquet .*": "--steps 2 --batch 2",
    r"kronos-stream evaluate held-out.csv .*": "",
    r"echo '[^']*' > runs/model.json": "",
}

# Commands that run until they are stopped.
UNTIL_STOPPED = r"kronos-stream exchange .*"

# Replacements in programs for names that need a network.
INSTEAD = {
    "NeoQuasar/Kronos-small": str(ROOT / "tests/data/parity/tiny/predictor"),
    "NeoQuasar/Kronos-Tokenizer-base": str(ROOT / "tests/data/parity/tiny/tokenizer"),
    '"steps": 2000': '"steps": 2, "batch": 2',
}

# Definitions that the text around a program assumes.
GIVEN = """
import pandas as pd
candles = pd.read_csv("btc.csv")[-120:].reset_index(drop=True)
times = candles.pop("time").to_numpy()
x_timestamp, values = pd.Series(pd.to_datetime(times, unit="ms")), candles.to_numpy()
y_timestamp = x_timestamp[-24:].reset_index(drop=True) + pd.Timedelta("2h")
"""

# Runs a program as at Python's prompt, where await is allowed outside of functions.
PROMPT = """
import ast, asyncio, inspect, pathlib, sys
code = compile(pathlib.Path(sys.argv[1]).read_text("utf-8"), sys.argv[1], "exec",
               ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
names = {"__name__": "__main__"}
if code.co_flags & inspect.CO_COROUTINE:
    asyncio.run(eval(code, names))
else:
    exec(code, names)
"""


def test_every_block_has_a_known_language() -> None:
    assert len(BLOCKS) > 10
    checked = [*SHELL, *PROGRAMS, *MESSAGES, *ENVIRONMENTS, *QUERIES]
    rest = [block for block in BLOCKS if block not in checked]
    known = (*ILLUSTRATIONS, SYMBOLS, MOSQUITTO)
    unknown = [str(block) for block in rest if not block.text.lstrip().startswith(known)]
    assert unknown == [], "no known language; add the block to ILLUSTRATIONS with a reason"
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text("utf-8"), re.MULTILINE)
        count = sum(block.page == page for block in BLOCKS)
        assert len(fences) == 2 * count, f"{page}: a fence is indented or not closed"


def test_tests_named_in_reasons_exist() -> None:
    reasons = " ".join((*ELSEWHERE.values(), *ILLUSTRATIONS.values()))
    names = set(re.findall(r"tests/[\w/.]+|\.ci/run", reasons))
    assert len(names) > 10
    assert {name for name in names if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_succeed(block: Block, sandbox: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KRONOS_STREAM_")}
    environ |= {"PATH": f"{Path(sys.executable).parent}:{environ['PATH']}", "OMP_NUM_THREADS": "1"}
    exported: dict[str, str] = {}
    assert any(shell_commands(block)), "no line begins with a prompt"
    for command in filter(None, shell_commands(block)):
        if command.startswith("export "):
            exported |= _assigned(shlex.split(command)[1:])
        elif added := [more for known, more in HERE.items() if re.fullmatch(known, command)]:
            line = f"{command} {added[0]}"
            done = subprocess.run(
                ["bash", "-c", line],  # noqa: S607
                cwd=sandbox, env=environ, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}: {done.stderr}"
        elif re.fullmatch(UNTIL_STOPPED, command):
            _start_and_stop(command, sandbox, environ)
        else:
            known = [known for known in ELSEWHERE if re.fullmatch(known, command)]
            assert known, f"no test runs {command!r}: add it to HERE or ELSEWHERE"
        check_command(command)
    _check_settings(exported, sandbox)


def _start_and_stop(command: str, folder: Path, environ: dict[str, str]) -> None:
    process = subprocess.Popen(
        shlex.split(command), cwd=folder, env=environ, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()  # it prints a line when it is ready
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_SECONDS) in {0, 130}
    finally:
        process.kill()
        process.communicate()


def _assigned(words: list[str]) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _check_settings(variables: dict[str, str], folder: Path) -> None:
    """Check that the settings exist and, if they are complete, that the daemon accepts them."""
    for name in variables:
        assert is_setting(name), name
        if name not in SETTINGS:  # the path of a secret
            (folder / name).write_text("secret", "utf-8")
            variables[name] = str(folder / name)
    if {"KRONOS_STREAM_SYMBOLS", "KRONOS_STREAM_SINKS"} <= variables.keys():
        read_settings(variables)


def test_messages_and_environment_files_are_valid(tmp_path: Path) -> None:
    for block in MESSAGES:
        message = json.loads(block.text)
        name = message.get("schema", "kronos.candle/1").removeprefix("kronos.").removesuffix("/1")
        Draft202012Validator(contract.json_schema(name)).validate(message)
    for block in ENVIRONMENTS:
        lines = [line for line in block.text.splitlines() if line and not line.startswith("#")]
        _check_settings(_assigned(lines), tmp_path)


def _text(first: str) -> str:
    (block,) = (block for block in BLOCKS if block.text.startswith(first))
    return block.text


def test_symbols_file_is_valid(tmp_path: Path) -> None:
    (tmp_path / "symbols").write_text(_text(SYMBOLS), "utf-8")
    given = {"SYMBOLS_FILE": str(tmp_path / "symbols"), "SINKS": "jsonl", "JSONL__PATH": "x.jsonl"}
    settings = read_settings({f"KRONOS_STREAM_{name}": value for name, value in given.items()})
    assert len(settings.watchlist()) == len(_text(SYMBOLS).splitlines())


def test_mosquitto_accepts_its_settings(make_mosquitto: Callable[..., Mosquitto]) -> None:
    with make_mosquitto(persistent=False, settings=_text(MOSQUITTO).splitlines()) as broker:
        assert "Error" not in broker.log_file.read_text("utf-8")


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_programs_run(block: Block, sandbox: Path, make_forecast: Callable[..., Envelope]) -> None:
    reads = "forecasts(" in block.text
    out, errors = sandbox / "out", sandbox / "errors"
    with (
        EmbeddedBroker([topic_of("kronos")]) as broker,
        out.open("w") as stdout,
        errors.open("w") as stderr,
    ):
        text = block.text if reads else GIVEN + block.text
        for name, value in {**INSTEAD, "localhost:9092": broker.bootstrap}.items():
            text = text.replace(name, value)
        (sandbox / "program.py").write_text(text, "utf-8")
        line = [sys.executable, "-u", "-c", PROMPT, "program.py"]
        process = subprocess.Popen(line, cwd=sandbox, stdout=stdout, stderr=stderr)

        def ended_or_printed() -> bool:
            sent = make_forecast("binance:BTC/USDT:5m")
            producer = Producer({"bootstrap.servers": broker.bootstrap})
            producer.produce(topic_of("kronos"), sent.value, sent.key, headers=list(sent.headers))
            assert producer.flush(WAIT_SECONDS) == 0
            return process.poll() is not None or out.stat().st_size > 0

        try:
            if reads:
                wait_for(f"{block} prints something", ended_or_printed, interval=0.3)
            else:
                process.wait(WAIT_SECONDS)
            status = process.poll()
        finally:
            process.kill()
            process.wait()
    assert status == (None if reads else 0), errors.read_text("utf-8")


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A folder with the files that the pages name."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    columns = ["open", "high", "low", "close", "volume", "amount"]
    for seed, name in enumerate(("btc.csv", "eth.parquet", "held-out.csv")):
        bars = Market(1, 300_000, seed=seed).run(1_000)
        frame = pd.DataFrame(bars.values[:, 0], columns=columns)  # noqa: PD011 - no pandas there
        frame["time"] = bars.times
        if name.endswith(".csv"):
            frame.to_csv(tmp_path / name, index=False)
        else:
            frame.to_parquet(tmp_path / name)
    return tmp_path
