"""What README and docs/ show is true: each block runs, and each name and link leads somewhere.

Every fenced block is either run here, or named below with the reason why not. A block that is
neither fails the test, so that no new one slips by.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pandas as pd
import pytest
from confluent_kafka import Producer
from jsonschema import Draft202012Validator

from kronos_connectors.kafka.topics import forecast_topic as topic_of
from kronos_stream.cli import cli
from kronos_stream.daemon.config.environment import read_settings
from kronos_stream.daemon.config.reference import describe_settings
from kronos_stream.forecast import contract
from kronos_stream.interfaces.sink import Envelope
from kronos_stream.testing.broker import EmbeddedBroker
from kronos_stream.testing.market import Market
from tests.support.mosquitto import Mosquitto
from tests.support.paths import ROOT
from tests.support.processes import wait_for

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Blocks that are neither commands nor programs: how the first line begins → what stands there.
PICTURES = {
    "exchange ──frames──▶ connector": "a drawing",
    "venues ──▶ ingest ──▶": "a drawing",
    "ok    state file:": "what doctor says, shortened; tests/system/test_doctor.py",
    "# values.yaml": "values of the chart; tests/deploy/test_helm_chart.py",
    "secrets:\n": "likewise; tests/deploy/test_helm_chart.py",
    "mode: split\n": "likewise; tests/deploy/test_helm_chart.py",
    "Status: ": "what systemctl shows; tests/deploy/test_systemd.py",
    "[Service]\n": "an addition to the unit; tests/deploy/test_systemd.py",
    "security.protocol=": "how kafka-acls.sh logs in: Kafka's own",
    "35 forecasts of 5 series": "what the demo shows, shortened; tests/system/test_demo.py",
}
SYMBOLS = "binance:BTC/USDT                  # spot"
MOSQUITTO = "persistence true"

# Commands that are not run here, but looked over: pattern → the test that runs them, or why none.
ELSEWHERE = {
    r"make deploy-check|(helm|kubectl) .*": "tests/deploy/test_helm_chart.py",
    r"docker compose .*": "tests/deploy/test_compose.py",
    r"make image.*|docker (run|build) .*": "tests/deploy/test_image_built.py",
    r"docker (tag|push) .*": "Docker's own",
    r"build/deploy/helm template .* --values values.yaml": "tests/deploy/test_helm_chart.py",
    r"git (fetch --tags|checkout v.*)|rm -rf dist": "git's own",
    r"/opt/kronos-stream/bin/pip wheel .*": "tests/deploy/test_wheel.py builds one, of the same tree",
    r"make (sbom|audit)": ".ci/run makes the one; the other asks PyPI",
    r"set -a; \. \./(ingest|forecast)\.env; set \+a": "the files are checked above it",
    r"kafka-consumer-groups\.sh .*": "Kafka's own",
    r"kafka-acls\.sh .*": "tests/system/test_daemon_security.py",
    r"make demo.*": "tests/system/test_demo.py",
    r"make test.*|make lint": ".ci/run",
    r"make( format| parity-hub| soak| bench)?": "for developers; the target exists",
    r"\. \.venv/bin/activate": "this test runs in an environment, too",
    r"kronos-stream run( --check)?": "tests/system/test_shutdown.py",
    r"(sudo|sudoedit|systemctl|journalctl|systemd-ask-password) .*": "tests/deploy/test_systemd.py",
    r"kronos-stream topics (create|check).*": "tests/integration/kafka/test_kafka_topics.py",
    r"kronos-stream tail.*": "tests/integration/kafka/test_tail.py",
    r"kronos-stream doctor.*": "tests/system/test_doctor.py",
    r"curl -s localhost:8080/.*": "tests/deploy/test_monitoring.py",
    r"kronos-stream train .* --init NeoQuasar/.*": "needs the model hub; tests/unit/training/test_training.py",
    r"python docs/examples/.*": "tests/system/test_examples.py",
    r"(cp|freqtrade) .*": "tests/system/test_examples.py",
    r"echo 'kafka:.*' \| kcat .*": "tests/system/test_kafka_candles.py",
}

# Commands that run here, and what is added so that they end soon.
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

METRIC = r"\b(kronos_(?!stream\b|connectors\b)\w+)(?:\{([\w,]+)\})?"

# What stands in a program for what is not there without a network.
INSTEAD = {
    "NeoQuasar/Kronos-small": str(ROOT / "tests/data/parity/tiny/predictor"),
    "NeoQuasar/Kronos-Tokenizer-base": str(ROOT / "tests/data/parity/tiny/tokenizer"),
    '"steps": 2000': '"steps": 2, "batch": 2',
}

# What the text around a program says is there.
GIVEN = """
import pandas as pd
candles = pd.read_csv("btc.csv")[-120:].reset_index(drop=True)
times = candles.pop("time").to_numpy()
x_timestamp, values = pd.Series(pd.to_datetime(times, unit="ms")), candles.to_numpy()
y_timestamp = x_timestamp[-24:].reset_index(drop=True) + pd.Timedelta("2h")
"""

# Python as at its prompt, where await may stand outside of functions.
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

# Words in capitals that are no settings of ours.
WORDS = {
    "ARGS",
    "ENGINE",
    "HEALTHCHECK",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "KAFKA_HOME",
    "PIP_INDEX_URL",
    "SIGHUP",
    "SIGTERM",
    "SOURCE_DATE_EPOCH",
    "TORCH_CPU_INDEX",
}


class Block(NamedTuple):
    """What stands between two fences."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])


BLOCKS = list(_blocks())
SHELL = [block for block in BLOCKS if block.language in {"console", "sh", "bash", "shell"}]
PROGRAMS = [block for block in BLOCKS if block.language == "python"]
MESSAGES = [block for block in BLOCKS if block.language == "json"]
ENVIRONMENTS = [block for block in BLOCKS if block.language in {"env", "ini"}]
QUERIES = [block for block in BLOCKS if block.language == "promql"]
SETTINGS = {setting.name for setting in describe_settings()}


def _commands(block: Block) -> list[str]:
    """Its commands, without prompts and comments, continued lines as one."""
    text = block.text.replace("\\\n", " ").replace("|\n", "| ")
    prompt = r"\$ " if block.language == "console" else ""
    lines = re.findall(rf"^{prompt}(.+)$", text, re.MULTILINE)
    return [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]


def _spans() -> Iterator[tuple[Path, str]]:
    """What stands between backticks in running text."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for found in re.finditer(r"(`+)(.+?)\1", text, re.DOTALL):
            yield page, " ".join(found[2].split())


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert len(BLOCKS) > 10
    checked = [*SHELL, *PROGRAMS, *MESSAGES, *ENVIRONMENTS, *QUERIES]
    rest = [block for block in BLOCKS if block not in checked]
    known = (*PICTURES, SYMBOLS, MOSQUITTO)
    unknown = [str(block) for block in rest if not block.text.lstrip().startswith(known)]
    assert unknown == [], "in no language that is run here; say in PICTURES why not"
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text("utf-8"), re.MULTILINE)
        ours = [block for block in BLOCKS if block.page == page]
        assert len(fences) == 2 * len(ours), f"{page}: a fence that is indented, or not closed"


def test_tests_that_are_referred_to_exist() -> None:
    for why in (*ELSEWHERE.values(), *PICTURES.values()):
        for name in re.findall(r"tests/\w+\.py|\.ci/run", why):
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_do_what_they_should(block: Block, sandbox: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KRONOS_STREAM_")}
    environ |= {"PATH": f"{Path(sys.executable).parent}:{environ['PATH']}", "OMP_NUM_THREADS": "1"}
    told: dict[str, str] = {}
    assert any(_commands(block)), "no line begins with a prompt"
    for command in filter(None, _commands(block)):
        if command.startswith("export "):
            told |= _assigned(shlex.split(command)[1:])
        elif more := [added for known, added in HERE.items() if re.fullmatch(known, command)]:
            line = f"{command} {more[0]}"
            ran = subprocess.run(
                ["bash", "-c", line],  # noqa: S607
                cwd=sandbox, env=environ, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert ran.returncode == 0, f"{line}: {ran.stderr}"
        elif re.fullmatch(UNTIL_STOPPED, command):
            _start_and_stop(command, sandbox, environ)
        else:
            known = [known for known in ELSEWHERE if re.fullmatch(known, command)]
            assert known, f"no test runs {command!r}: name it in HERE or ELSEWHERE"
        _check_command(command)
    _check_settings(told, sandbox)


def _start_and_stop(command: str, folder: Path, environ: dict[str, str]) -> None:
    process = subprocess.Popen(
        shlex.split(command), cwd=folder, env=environ, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()  # it says something once it runs
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in {0, 130}
    finally:
        process.kill()
        process.communicate()


def _check_command(command: str) -> None:
    """Whether there is such a target of make, and such options of ours."""
    name, *words = shlex.split(command)
    if name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= {*targets}, command
    elif name == "kronos-stream":
        found: click.Command = cli
        context = click.Context(cli)
        while isinstance(found, click.Group) and words and not words[0].startswith("-"):
            inner = found.get_command(context, words.pop(0))
            assert inner is not None, command
            found, context = inner, click.Context(inner, parent=context)
        given, _, _ = found.make_parser(context).parse_args(words)
        for option in found.params:
            if isinstance(option, click.Option) and option.name in given:
                option.process_value(context, given[option.name])


def _assigned(words: list[str]) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _check_settings(told: dict[str, str], folder: Path) -> None:
    """Whether the daemon takes these settings."""
    for name in told:
        assert _is_setting(name), name
        if name not in SETTINGS:  # the path of a secret
            (folder / name).write_text("secret", "utf-8")
            told[name] = str(folder / name)
    if {"KRONOS_STREAM_SYMBOLS", "KRONOS_STREAM_SINKS"} <= told.keys():
        read_settings(told)


def _is_setting(name: str) -> bool:
    return {name, name.removesuffix("_FILE")} & SETTINGS != set()


def test_messages_and_environment_files_are_taken(tmp_path: Path) -> None:
    for block in MESSAGES:
        message = json.loads(block.text)
        name = message.get("schema", "kronos.candle/1").removeprefix("kronos.").removesuffix("/1")
        Draft202012Validator(contract.json_schema(name)).validate(message)
    for block in ENVIRONMENTS:
        lines = [line for line in block.text.splitlines() if line and not line.startswith("#")]
        _check_settings(_assigned(lines), tmp_path)


def _text(first: str) -> str:
    (block,) = (one for one in BLOCKS if one.text.startswith(first))
    return block.text


def test_the_file_of_symbols_is_taken(tmp_path: Path) -> None:
    (tmp_path / "symbols").write_text(_text(SYMBOLS), "utf-8")
    told = {"SYMBOLS_FILE": str(tmp_path / "symbols"), "SINKS": "jsonl", "JSONL__PATH": "x.jsonl"}
    settings = read_settings({f"KRONOS_STREAM_{name}": value for name, value in told.items()})
    assert len(settings.watchlist()) == len(_text(SYMBOLS).splitlines())


def test_mosquitto_takes_its_settings(make_mosquitto: Callable[..., Mosquitto]) -> None:
    with make_mosquitto(persistent=False, settings=_text(MOSQUITTO).splitlines()) as broker:
        assert "Error" not in broker.log_file.read_text("utf-8")


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_programs_run(block: Block, sandbox: Path, make_forecast: Callable[..., Envelope]) -> None:
    reads = "forecasts(" in block.text
    out, errors = sandbox / "out", sandbox / "errors"
    with (
        EmbeddedBroker([topic_of("kronos")]) as broker,
        out.open("w") as one,
        errors.open("w") as two,
    ):
        text = block.text if reads else GIVEN + block.text
        for name, value in {**INSTEAD, "localhost:9092": broker.bootstrap}.items():
            text = text.replace(name, value)
        (sandbox / "program.py").write_text(text, "utf-8")
        line = [sys.executable, "-u", "-c", PROMPT, "program.py"]
        process = subprocess.Popen(line, cwd=sandbox, stdout=one, stderr=two)

        def ended_or_said() -> bool:
            said = make_forecast("binance:BTC/USDT:5m")
            producer = Producer({"bootstrap.servers": broker.bootstrap})
            producer.produce(topic_of("kronos"), said.value, said.key, headers=list(said.headers))
            assert producer.flush(10) == 0
            return process.poll() is not None or out.stat().st_size > 0

        try:
            if reads:
                wait_for(f"{block} says something", ended_or_said, interval=0.3)
            else:
                process.wait(120)
            status = process.poll()
        finally:
            process.kill()
            process.wait()
    assert status == (None if reads else 0), errors.read_text("utf-8")


def test_commands_in_the_text_can_be_given() -> None:
    found = [span for _, span in _spans() if re.match(r"(kronos-stream|make) ", span)]
    assert len(found) > 10
    for command in found:
        _check_command(command)


def test_settings_in_the_text_exist() -> None:
    whole = "\n".join(page.read_text("utf-8") for page in PAGES)
    names = set(re.findall(r"KRONOS_STREAM_\w*", whole))
    for _, span in _spans():
        names.update(
            f"KRONOS_STREAM_{name}" for name in re.findall(r"\b(?!KRONOS_)[A-Z]+__[A-Z_]*", span)
        )
        if alone := re.fullmatch(r"(?!KRONOS_)([A-Z][A-Z_]+)(=.*)?", span):
            names.add(f"KRONOS_STREAM_{alone[1]}")
    names -= {f"KRONOS_STREAM_{word}" for word in WORDS}
    assert len(names) > 20
    for name in names:
        begins = name.endswith("_") and any(one.startswith(name) for one in SETTINGS)
        assert begins or _is_setting(name), name


def test_metrics_in_the_text_exist(metric_labels: dict[str, frozenset[str]]) -> None:
    """In running text and tables; queries are looked over by tests/deploy/test_monitoring.py."""
    asked = [
        (found[1], set(re.findall(r"\w+", found[2] or "")))
        for page in PAGES
        for found in re.finditer(METRIC, page.read_text("utf-8"))
    ]
    assert len(asked) > 15
    for name, labels in asked:
        assert labels <= metric_labels[name], f"{name}{labels}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path), target


def _anchors(page: Path) -> set[str]:
    """What its headings are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A folder like the checkout, with the files that the pages name."""
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
