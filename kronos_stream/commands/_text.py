"""Text from outside, made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on one line, with a question mark for each control character."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
