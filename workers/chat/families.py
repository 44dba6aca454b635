"""The ways in which models call tools, told from their templates, and grammars that hold them to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How a model calls a tool: JSON with its name and arguments, and what stands around that.

    Attributes:
        name: Of the family.
        mark: What announces a call, anywhere in the text; empty: nothing does, and it begins the text.
        end: What may stand behind a call.
        before: What a model writes before the JSON object of a call.
        after: And behind it.
        key: Of the arguments in that object.
        named: Whether a call may be the name, then the arguments, and no object around them.
    """

    name: str
    mark: str = ""
    end: str = ""
    before: str = ""
    after: str = ""
    key: str = "arguments"
    named: bool = False


HERMES = Family("hermes", "<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>")
LLAMA_3 = Family("llama-3", "<|python_tag|>", key="parameters")
MISTRAL = Family("mistral", "[TOOL_CALLS]", before="[TOOL_CALLS][", after="]", named=True)
GENERIC = Family("json")

THINK, END_THINK = "<think>", "</think>"
# What is thought may have no other end tag in it: a grammar cannot look for a whole word.
_THINK = r'think ::= ([^<] | "<" [^/])* "</think>" [ \n]*'


def family_of(template: str) -> Family:
    """By what a template says of tools."""
    if HERMES.mark in template:
        return HERMES
    if MISTRAL.mark in template:
        return MISTRAL
    if LLAMA_3.mark in template or "<|start_header_id|>" in template:
        return LLAMA_3
    return GENERIC


def call_rules(family: Family, names: Sequence[str], *, thinking: bool) -> str:
    """A grammar (GBNF) of a call of one of these tools; rule ``arguments-N`` has the Nth's arguments.

    Args:
        family: How it is called.
        names: Of the tools.
        thinking: Whether the text begins with the rest of what is thought.
    """
    lines = [_root(thinking, literal(family.before), "call", literal(family.after))]
    lines.append("call ::= " + " | ".join(f"call-{i}" for i in range(len(names))))
    for i, name in enumerate(names):
        begin = f'{{"name": {json.dumps(name)}, "{family.key}": '
        lines.append(f"call-{i} ::= {literal(begin)} arguments-{i} {literal('}')}")
    return "\n".join(lines + [_THINK] * thinking)


def answer_rules(*, thinking: bool) -> str:
    """A grammar (GBNF) of what rule ``answer`` has; see `call_rules`."""
    return "\n".join([_root(thinking, "answer"), *([_THINK] * thinking)])


def _root(thinking: bool, *parts: str) -> str:
    return "root ::= " + " ".join([*(["think"] * thinking), *filter(None, parts)])


def literal(text: str) -> str:
    """A text in GBNF."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{quoted}"' if text else ""
