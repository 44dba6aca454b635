"""The messages of a chat, in OpenAI's shape: checked, and made what templates expect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from crumplezone.errors import InputError
from crumplezone.workers.text.texts import encoded

Json = dict[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGES_MAX = 2**16
_PARTS_MAX = 2**12


def checked_messages(messages: object) -> list[Json]:
    """Copies of messages, with texts for contents and with arguments of tool calls as objects.

    Raises:
        InputError: One of them is none; it names the field.
    """
    given = _list("messages", messages, _MESSAGES_MAX)
    if not given:
        raise InputError("messages", messages, "must have at least one message")
    checked = [_message(f"messages[{i}]", message) for i, message in enumerate(given)]
    for i, message in enumerate(checked):
        encoded(f"messages[{i}]", message)  # they go to a cell
    return checked


def _message(field: str, message: object) -> Json:
    found = mapping(field, message)
    role = one_of(f"{field}.role", found.get("role"), _ROLES)
    calls = found.get("tool_calls")
    content = found.get("content")
    if content is None and not (role == "assistant" and calls):
        raise InputError(f"{field}.content", content, "must be a text, or a list of text parts")
    checked = found | {"role": role, "content": "" if content is None else _content(field, content)}
    checked.pop("tool_calls", None)
    if calls is not None:
        if role != "assistant":
            raise InputError(f"{field}.tool_calls", calls, f"must not be in a message of the role {role}")
        if each := _list(f"{field}.tool_calls", calls, _PARTS_MAX):
            checked["tool_calls"] = [_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(each)]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if checked.get(name) is None:
            checked.pop(name, None)
        else:
            text(f"{field}.{name}", checked[name])
    return checked


def _content(field: str, content: object) -> str:
    if isinstance(content, str):
        return content
    parts = _list(f"{field}.content", content, _PARTS_MAX)
    return "\n".join(_part(f"{field}.content[{i}]", part) for i, part in enumerate(parts))


def _part(field: str, part: object) -> str:
    found = mapping(field, part)
    if found.get("type") != "text":
        limit = "must be 'text': images, sound and files are not read here"
        raise InputError(f"{field}.type", found.get("type"), limit)
    return text(f"{field}.text", found.get("text"))


def _call(field: str, call: object) -> Json:
    found = mapping(field, call)
    if found.get("type", "function") != "function":
        raise InputError(f"{field}.type", found.get("type"), "must be 'function'")
    function = mapping(f"{field}.function", found.get("function"))
    name = text(f"{field}.function.name", function.get("name"))
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    else:
        arguments = mapping(f"{field}.function.arguments", arguments)
    return found | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _parsed(arguments: str) -> Any:
    """Arguments as templates expect them; what a model once cut off stays as it was."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def mapping(field: str, value: object) -> Json:
    """A copy of an object.

    Raises:
        InputError: It is none.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(field, value, "must be an object (a dict)")
    return dict(value)


def text(field: str, value: object) -> str:
    """A text.

    Raises:
        InputError: It is none.
    """
    if not isinstance(value, str):
        raise InputError(field, value, "must be a text")
    return value


def one_of(field: str, value: object, known: Iterable[str]) -> str:
    """A text that is one of some.

    Raises:
        InputError: It is not.
    """
    if not isinstance(value, str) or value not in known:
        raise InputError(field, value, f"must be one of {', '.join(known)}")
    return value


def _list(field: str, value: object, most: int) -> list[object]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InputError(field, value, "must be a list")
    found = list(value)
    if len(found) > most:
        raise InputError(f"length of {field}", len(found), f"must be at most {most}")
    return found
