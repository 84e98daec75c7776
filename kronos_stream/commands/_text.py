"""Text from outside, on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line; what a terminal would take for a command becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
