"""``kronos-stream doctor``: find out what is wrong with a daemon's settings and surroundings."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import click

from kronos_stream.commands._text import printable
from kronos_stream.redaction import redact

if TYPE_CHECKING:
    from kronos_stream.daemon.config.settings import Settings
    from kronos_stream.interfaces.diagnostics import Finding

_FAILED, _INVALID_SETTINGS = 1, 2
_CLEAR_LINE = "\r\x1b[K"
"""Moves to the start of the line and erases it."""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
@click.option(
    "--skip",
    type=click.Choice(["state", "http", "venues", "sinks", "model"]),
    multiple=True,
    help="Skip an area: the model, for example, while a daemon needs the memory. May be given "
    "several times.",
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, skip: tuple[str, ...]) -> None:  # noqa: FBT001
    """Check everything that the daemon depends on, with its present settings.

    Prints a line per finding: ok, warn or fail, the finding, and how to correct it. Checks the
    settings, the state file and its disk, the HTTP port, the venues (reachable, clock, symbols),
    the sinks (reachable, login, topics, permissions) and the model (loads, and forecasts in time).
    It sends no record and changes nothing; a daemon may run meanwhile.

    Exit code 0: nothing failed. 1: a check failed. 2: the settings are invalid.
    """
    import os

    from kronos_stream.daemon.config.environment import read_settings
    from kronos_stream.daemon.config.settings import SettingsError
    from kronos_stream.daemon.doctor.doctor import environment_finding, run_until_interrupted
    from kronos_stream.daemon.telemetry.logs import configure
    from kronos_stream.interfaces.diagnostics import Finding

    report = _Report(as_json=as_json)
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        for problem in error.problems:
            remedy = "kronos-stream run --help lists all settings"
            report.add("settings", Finding("fail", problem, remedy))
        report.finish()
        ctx.exit(_INVALID_SETTINGS)
    configure("console", "error")
    report.add("settings", environment_finding(os.environ))
    run_until_interrupted(_examine(settings, skip, report))
    report.finish()
    if report.failed:
        ctx.exit(_FAILED)


async def _examine(settings: Settings, skip: Collection[str], report: _Report) -> None:
    from kronos_stream.daemon.doctor.doctor import Doctor

    async for result in Doctor(settings).examine(report.check_started, skip):
        report.add(result.name, result.finding)


def print_finding(name: str, finding: Finding) -> None:
    """Print a line with the level in colour and secrets masked."""
    level = click.style(f"{finding.level:4}", fg=_COLOURS[finding.level])
    click.echo(f"{level}  {printable(redact(finding_text(name, finding)))}")


def finding_text(name: str, finding: Finding) -> str:
    """The finding of the check ``name``, and how to correct it, as one sentence."""
    return f"{name}: {finding.found}" + (f"; {finding.remedy}" if finding.remedy else "")


class _Report:
    """Prints findings: as lines when they are added, or as one JSON object at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._interactive = sys.stderr.isatty()
        self._findings: list[dict[str, Any]] = []

    @property
    def failed(self) -> bool:
        return any(finding["level"] == "fail" for finding in self._findings)

    def check_started(self, name: str) -> None:
        """Show the running check on a terminal."""
        if self._interactive:
            click.echo(f"{_CLEAR_LINE}...   {name}", err=True, nl=False)

    def add(self, name: str, finding: Finding) -> None:
        level, found, remedy = finding
        found = redact(found)
        row = {"check": name, "level": level, "found": found, "cure": remedy or None}
        self._findings.append(row)
        if self._interactive:
            click.echo(_CLEAR_LINE, err=True, nl=False)
        if not self._as_json:
            print_finding(name, finding)

    def finish(self) -> None:
        import json

        if self._as_json:
            report = {"ok": not self.failed, "findings": self._findings}
            click.echo(json.dumps(report, indent=2, ensure_ascii=False))
