"""Tools, which of them are to be called, and the form of an answer, in OpenAI's shape: checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crumplezone.errors import InputError
from crumplezone.workers.chat.families import Family, answer_rules, call_rules
from crumplezone.workers.chat.messages import Json, mapping, one_of, text
from crumplezone.workers.text.texts import encoded

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_TOOLS_MAX = 256
_NOTHING: Json = {"type": "object", "properties": {}}  # of a tool that takes no arguments

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        given: As templates get them.
        choice: Whether one is to be called.
        only: The one that has to be, if it was named.
    """

    given: tuple[Json, ...] = ()
    choice: Choice = "none"
    only: str = ""

    @property
    def usable(self) -> list[Json]:
        """Those that may be called."""
        if self.choice == "none":
            return []
        return [each for each in self.given if self.only in ("", each["function"]["name"])]

    @property
    def names(self) -> list[str]:
        """Of those that may be called."""
        return [each["function"]["name"] for each in self.usable]

    @property
    def forced(self) -> bool:
        """Whether one has to be called."""
        return bool(self.only) or self.choice == "required"

    def grammar(self, family: Family, *, thinking: bool) -> tuple[str, dict[str, Any]]:
        """Rules, and the schemas that they need, of an answer that calls one of them."""
        schemas = {
            f"arguments-{i}": each["function"].get("parameters") or _NOTHING
            for i, each in enumerate(self.usable)
        }
        return call_rules(family, self.names, thinking=thinking), schemas


def checked_tools(tools: object, choice: object) -> Tools:
    """The tools of a request.

    Raises:
        InputError: One of them is none, or a choice is not among them.
    """
    if tools is None or tools == []:
        if choice not in (None, "auto", "none"):
            raise InputError("tool_choice", choice, "must be 'none' or 'auto': there are no tools")
        return Tools()
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InputError("tools", tools, "must be a list")
    if len(tools) > _TOOLS_MAX:
        raise InputError("number of tools", len(tools), f"must be at most {_TOOLS_MAX}")
    given = tuple(_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools))
    names = [each["function"]["name"] for each in given]
    if len({*names}) < len(names):
        raise InputError("names of tools", names, "must differ")
    if isinstance(choice, Mapping):
        function = mapping("tool_choice.function", choice.get("function"))
        return Tools(given, "required", one_of("tool_choice.function.name", function.get("name"), names))
    match "auto" if choice is None else choice:
        case "none" | "auto" | "required" as known:
            return Tools(given, known)
    limit = "must be 'none', 'auto', 'required', or {'type': 'function', 'function': {'name': ...}}"
    raise InputError("tool_choice", choice, limit)


def _tool(field: str, tool: object) -> Json:
    found = mapping(field, tool)
    if found.get("type", "function") != "function":
        raise InputError(f"{field}.type", found.get("type"), "must be 'function'")
    function = mapping(f"{field}.function", found.get("function"))
    name = text(f"{field}.function.name", function.get("name"))
    if not _NAME.fullmatch(name):
        limit = "must have 1 to 64 letters, digits, dots, dashes and underscores"
        raise InputError(f"{field}.function.name", name, limit)
    if function.get("parameters") is not None:
        function["parameters"] = mapping(f"{field}.function.parameters", function["parameters"])
    encoded(f"{field}.function", function)  # it goes to a cell
    return found | {"type": "function", "function": function}


def answer_schema(response_format: object) -> Json | None:
    """The JSON schema that an answer has to satisfy, or None.

    Raises:
        InputError: It is no ``response_format``.
    """
    if response_format is None:
        return None
    found = mapping("response_format", response_format)
    match found.get("type"):
        case "text":
            return None
        case "json_object":
            schema = found.get("schema")
            return {"type": "object"} if schema is None else mapping("response_format.schema", schema)
        case "json_schema":
            inner = mapping("response_format.json_schema", found.get("json_schema"))
            return mapping("response_format.json_schema.schema", inner.get("schema"))
    known = ("text", "json_object", "json_schema")
    one_of("response_format.type", found.get("type"), known)
    raise AssertionError


def answer_grammar(schema: Json, *, thinking: bool) -> tuple[str, dict[str, Any]]:
    """Rules, and the schema that they need, of an answer that satisfies a schema."""
    return answer_rules(thinking=thinking), {"answer": schema}


_TELL = """You can call these functions:
{tools}
To call one, answer with nothing but a JSON object: {{"name": <its name>, "arguments": <object>}}"""


def told_in_text(messages: Sequence[Json], tools: Tools) -> list[Json]:
    """Messages for a template without tools: told of in the system message, calls and results as text."""
    told = [_as_text(message) for message in messages]
    if not tools.usable:
        return told
    words = _TELL.format(tools="\n".join(json.dumps(each["function"]) for each in tools.usable))
    first = told[0]
    if first["role"] in ("system", "developer"):
        return [first | {"content": f"{first['content']}\n\n{words}".lstrip()}, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def _as_text(message: Json) -> Json:
    if message["role"] == "tool":
        name = message.get("name") or message.get("tool_call_id") or ""
        return {"role": "user", "content": f"Result of the function call {name}: {message['content']}"}
    if not (calls := message.get("tool_calls")):
        return message
    lines = [json.dumps(call["function"]) for call in calls]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": "\n".join(filter(None, [message["content"], *lines]))}
