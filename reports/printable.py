"""Text of others, made harmless for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape what a terminal could act on: control, format and direction characters (``\x1b``)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
