"""Names in the text of README and docs/ exist: commands, settings, metrics and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documentation import PAGES, SETTINGS, check_command, code_spans, is_setting
from tests.support.paths import ROOT

METRIC = r"\b(kronos_(?!stream\b|connectors\b)\w+)(?:\{([\w,]+)\})?"

# Words in capitals that are not settings.
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


def test_commands_in_the_text_exist() -> None:
    found = [span for span in code_spans() if re.match(r"(kronos-stream|make) ", span)]
    assert len(found) > 10
    for command in found:
        check_command(command)


def test_settings_in_the_text_exist() -> None:
    whole = "\n".join(page.read_text("utf-8") for page in PAGES)
    names = set(re.findall(r"KRONOS_STREAM_\w*", whole))
    for span in code_spans():
        names.update(
            f"KRONOS_STREAM_{name}" for name in re.findall(r"\b(?!KRONOS_)[A-Z]+__[A-Z_]*", span)
        )
        if alone := re.fullmatch(r"(?!KRONOS_)([A-Z][A-Z_]+)(=.*)?", span):
            names.add(f"KRONOS_STREAM_{alone[1]}")
    names -= {f"KRONOS_STREAM_{word}" for word in WORDS}
    assert len(names) > 20
    for name in names:
        is_prefix = name.endswith("_") and any(known.startswith(name) for known in SETTINGS)
        assert is_prefix or is_setting(name), name


def test_metrics_in_the_text_exist(metric_labels: dict[str, frozenset[str]]) -> None:
    """In text and tables; tests/deploy/test_queries.py checks queries."""
    mentioned = [
        (found[1], set(re.findall(r"\w+", found[2] or "")))
        for page in PAGES
        for found in re.finditer(METRIC, page.read_text("utf-8"))
    ]
    assert len(mentioned) > 15
    for name, labels in mentioned:
        assert labels <= metric_labels[name], f"{name}{labels}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path), target


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
