"""``kronos-stream doctor``: what is wrong, or will be, and what to do about it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from kronos_stream.commands._text import printable

if TYPE_CHECKING:
    from kronos_stream.daemon.config.settings import Settings
    from kronos_stream.interfaces.diagnostics import Finding, Result

_FAILED, _INVALID_SETTINGS = 1, 2
_CLEAR_LINE = "\r\x1b[K"
"""Back to the beginning of an empty line."""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
@click.option(
    "--skip",
    type=click.Choice(["state", "http", "venues", "sinks", "model"]),
    multiple=True,
    help="Leave something out: the model, say, while a daemon needs the memory. May be given "
    "several times.",
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, skip: tuple[str, ...]) -> None:  # noqa: FBT001
    """Look over what the daemon depends on, as it is set to run now.

    A line per finding: ok, warn or fail, what was found, and the cure. Asks for settings, the
    state file and its disk, the HTTP port, the venues (reachable, clock, symbols), the sinks
    (reachable, login, topics, rights) and the model (it is loaded and makes a timed forecast).
    It sends no record and changes nothing; a daemon may run meanwhile.

    Exit code 0: nothing failed. 1: something did. 2: the settings cannot be read.
    """
    import asyncio
    import os

    from kronos_stream.daemon.config.environment import read_settings
    from kronos_stream.daemon.config.settings import SettingsError
    from kronos_stream.daemon.doctor.doctor import environment_finding
    from kronos_stream.daemon.telemetry.logs import configure

    report = _Report(as_json=as_json)
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        for problem in error.problems:
            report.add_settings_problem(problem)
        report.finish()
        ctx.exit(_INVALID_SETTINGS)
    configure("console", "error")
    report.add("settings", environment_finding(os.environ))
    asyncio.run(_examine(settings, skip, report))
    report.finish()
    if report.failed:
        ctx.exit(_FAILED)


async def _examine(settings: Settings, skip: tuple[str, ...], report: _Report) -> None:
    from kronos_stream.daemon.doctor.doctor import Doctor

    async for told in Doctor(settings).examine(report.check_started, skip):
        report.add_result(told)


class _Report:
    """Lines as they come, or one object at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.failed = False
        self._as_json = as_json
        self._interactive = sys.stderr.isatty()
        self._findings: list[dict[str, Any]] = []

    def check_started(self, name: str) -> None:
        """Let whoever waits see for what."""
        if self._interactive:
            click.echo(f"{_CLEAR_LINE}...   {name}", err=True, nl=False)

    def add_result(self, told: Result) -> None:
        self.add(told.name, told.finding)

    def add_settings_problem(self, problem: str) -> None:
        from kronos_stream.interfaces.diagnostics import Finding

        self.add("settings", Finding("fail", problem, "kronos-stream run --help lists them all"))

    def add(self, name: str, finding: Finding) -> None:
        from kronos_stream.daemon.telemetry.logs import redact

        level, found, cure = finding
        found = redact(found)
        self.failed = self.failed or level == "fail"
        self._findings.append({"check": name, "level": level, "found": found, "cure": cure or None})
        if self._interactive:
            click.echo(_CLEAR_LINE, err=True, nl=False)
        if not self._as_json:
            line = printable(f"{name}: {found}" + (f"; {cure}" if cure else ""))
            click.echo(f"{click.style(f'{level:4}', fg=_COLOURS[level])}  {line}")

    def finish(self) -> None:
        import json

        if self._as_json:
            whole = {"ok": not self.failed, "findings": self._findings}
            click.echo(json.dumps(whole, indent=2, ensure_ascii=False))
