"""Write the values table of the chart's README from the comments of values.yaml; --check compares.

A comment that begins with ``# --`` stands before each value that a user may set.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "kronos-stream"
BEGIN, END = "<!-- values.yaml -->\n", "<!-- end of values.yaml -->\n"


def rows(text: str) -> Iterator[tuple[str, Any, str]]:
    """Return path, default and comment of each value that has a comment."""
    values = yaml.safe_load(text)
    path: list[str] = []
    about: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            about = [stripped.removeprefix("# -- ")]
        elif stripped.startswith("#"):
            about += [stripped.removeprefix("#").strip()] if about else []
        elif found := re.match(r"( *)(\w+):", line):
            path[len(found[1]) // 2 :] = [found[2]]
            if about:
                default = values
                for name in path:
                    default = default[name]
                yield ".".join(path), default, " ".join(about)
            about = []


def table(text: str) -> str:
    """Return the rows as Markdown; parents of other rows have no default."""
    found = list(rows(text))
    paths = [path for path, _, _ in found]
    lines = ["| value | default | meaning |", "|---|---|---|"]
    for path, default, about in found:
        whole = any(other.startswith(f"{path}.") for other in paths)
        shown = "" if whole else f"`{json.dumps(default)}`"
        lines.append(f"| `{path}` | {shown} | {about} |")
    return "\n".join(lines) + "\n"


def main(*, check: bool) -> int:
    """Update the README, or report that it is outdated."""
    readme = CHART / "README.md"
    text = readme.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + table((CHART / "values.yaml").read_text("utf-8")) + END + after
    if wanted == text:
        return 0
    if check:
        print("the chart's README is out of date: python deploy/kubernetes/values_table.py")  # noqa: T201
        return 1
    readme.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
