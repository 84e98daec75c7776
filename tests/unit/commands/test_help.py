"""Help pages: complete summaries, defaults, and values that can be copied."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from kronos_stream.cli import cli
from kronos_stream.daemon.config.reference import describe_settings


def _help(command: str) -> str:
    done = CliRunner().invoke(cli, [*command.split(), "--help"], terminal_width=80)
    assert done.exit_code == 0, done.output
    return done.output


def _one_line(text: str) -> str:
    return " ".join(text.split())


def test_run_help_breaks_lines_only_at_spaces() -> None:
    words = _help("run").split()
    for setting in describe_settings():
        assert setting.name in words
        assert not setting.default or setting.default in " ".join(words)
        assert set(setting.description.split()) <= set(words)


def test_train_help_has_complete_summaries() -> None:
    page = _help("train")
    assert "..." not in page.partition("Commands:")[2]
    assert "Train a tokenizer on candles." in page
    assert "candle files, folders of them, or 'generated' markets" in _one_line(
        _help("train tokenizer")
    )


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("exchange", "[default: (1s, or the interval of the candles)]"),
        ("exchange", "as one list separated by commas, such as 1s,1m"),
        ("replay", "By default, KRONOS_STREAM_MODEL, or NeoQuasar/Kronos-small."),
        ("replay", "By default, KRONOS_STREAM_LOOKBACK, or 488."),
        ("replay", "kronos-stream replay captures/*.txt.gz"),
        ("schema", "MESSAGE is forecast, removal, deadletter or candle."),
    ],
)
def test_help_states_defaults_and_choices(command: str, text: str) -> None:
    assert text in _one_line(_help(command))


def test_unknown_message_is_named_as_the_argument() -> None:
    done = CliRunner().invoke(cli, ["schema", "nothing"])
    assert done.exit_code == 2
    assert "MESSAGE" in done.output
    assert "'forecast', 'removal', 'deadletter', 'candle'" in done.output
