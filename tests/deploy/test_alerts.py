"""Alerts: valid, tested, and explained in the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from tests.support.monitoring import (
    PROMETHEUS_CONFIG,
    RULES,
    RULES_TEST,
    RUNBOOK,
    alerts,
)
from tests.support.paths import ROOT


def _sections() -> dict[str, str]:
    """Sections of the runbook by anchor."""
    whole = RUNBOOK.read_text("utf-8")
    _, _, part = whole.partition("\n## When an alert fires\n")
    part, _, _ = part.partition("\n## ")
    pieces = re.split(r"^### (.+)$", part, flags=re.MULTILINE)[1:]
    return {
        title.lower().replace(" ", "-"): text
        for title, text in zip(pieces[::2], pieces[1::2], strict=True)
    }


def test_every_alert_has_a_description_and_a_section_in_the_runbook() -> None:
    sections = _sections()
    linked = set()
    for alert in alerts():
        name, notes = alert["alert"], alert["annotations"]
        assert re.fullmatch(r"Kronos[A-Z]\w+", name)
        assert alert["labels"]["severity"] in {"critical", "warning"}, name
        assert re.fullmatch(r"\d+[smh]", alert["for"]), name
        assert notes["summary"], name
        assert notes["description"].endswith("."), name
        path, _, anchor = notes["runbook_url"].partition("#")
        assert (ROOT / path).resolve() == RUNBOOK, name
        assert f"\n`{name}`, " in sections[anchor], name
        assert alert["labels"]["severity"] in sections[anchor], name
        linked.add(anchor)
    assert linked == sections.keys()


def test_every_section_has_all_parts() -> None:
    for anchor, text in _sections().items():
        for part in ("- **Look:** ", "- **Do:** ", "- **Ends** "):
            assert text.count(f"\n{part}") == 1, (anchor, part)


def test_rules_are_valid_and_pass_their_tests(promtool: str) -> None:
    for command in (
        ["check", "rules", str(RULES)],
        ["test", "rules", str(RULES_TEST)],
        ["check", "config", str(PROMETHEUS_CONFIG)],
    ):
        result = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_tests_of_rules_can_fail(promtool: str, tmp_path: Path) -> None:
    shutil.copy(RULES_TEST, tmp_path)
    text = RULES.read_text("utf-8")
    (tmp_path / RULES.name).write_text(text.replace("kronos_held_series > 0", "vector(0)"), "utf-8")
    result = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / RULES_TEST.name)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "KronosGapsOpen" in result.stdout + result.stderr


def test_every_alert_is_tested_firing_and_silent() -> None:
    checks = [
        check
        for case in yaml.safe_load(RULES_TEST.read_text("utf-8"))["tests"]
        for check in case["alert_rule_test"]
    ]
    fires = {check["alertname"] for check in checks if check["exp_alerts"]}
    silent = {check["alertname"] for check in checks if not check["exp_alerts"]}
    assert fires == silent == {alert["alert"] for alert in alerts()}
