"""Pages of the documentation: their code blocks, code spans, and checks of commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from kronos_stream.cli import cli
from kronos_stream.daemon.config.reference import describe_settings
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = {setting.name for setting in describe_settings()}


class Block(NamedTuple):
    """A fenced code block."""

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


def shell_commands(block: Block) -> list[str]:
    """Commands of a block without prompts and comments, continued lines joined."""
    text = block.text.replace("\\\n", " ").replace("|\n", "| ")
    prompt = r"\$ " if block.language == "console" else ""
    lines = re.findall(rf"^{prompt}(.+)$", text, re.MULTILINE)
    return [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]


def code_spans() -> Iterator[str]:
    """Text between backticks, outside of code blocks."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for found in re.finditer(r"(`+)(.+?)\1", text, re.DOTALL):
            yield " ".join(found[2].split())


def check_command(command: str) -> None:
    """Check that a target of make, or a command and options of kronos-stream, exist."""
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


def is_setting(name: str) -> bool:
    return {name, name.removesuffix("_FILE")} & SETTINGS != set()
