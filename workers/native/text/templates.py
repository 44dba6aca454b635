"""Child side: chat templates, which are code of whoever made the model. Only cells import this module.

The environment is that of llama-cpp-python 0.3.36 (llama_chat_format.Jinja2ChatFormatter), which is that of
transformers. What a sandbox of Python cannot hold back (time, memory), the limits of the cell do.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from crumplezone.workers.native.text.memory import MEMORY, little_memory


class TemplateError(Exception):
    """A template cannot be rendered with these messages."""


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the local time, as everywhere templates are rendered


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    made = ImmutableSandboxedEnvironment(
        loader=jinja2.BaseLoader(),
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, loopcontrols],
    )
    made.filters["tojson"] = Jinja2ChatFormatter.tojson
    return made.from_string(source)


def render(template: str, context: dict[str, Any], limit: int) -> str:
    """A rendered template.

    Args:
        template: Its source.
        context: What it is given.
        limit: Most bytes that it may become, in UTF-8.

    Raises:
        TemplateError: It cannot be rendered with this; the message says why.
    """
    known = {
        "raise_exception": _raise,
        "strftime_now": _now,
        "functions": None,
        "function_call": None,
        "tools": None,
        "tool_choice": None,
    }
    parts, left = list[str](), limit
    try:
        with little_memory():
            for part in _compiled(template).generate(**known | context):
                left -= len(part.encode("utf-8", "replace"))
                if left < 0:
                    raise TemplateError(f"it makes more than {limit} bytes of them")
                parts.append(part)
    except TemplateError:
        raise
    except MemoryError as error:
        raise TemplateError(f"it takes more than {MEMORY} bytes of memory") from error
    except Exception as error:  # whatever its code raises
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return "".join(parts)


class Literals:
    """Special tokens that stand in what messages say: there they are text.

    Before the messages are rendered, a mark takes the place of each; so it is known which parts of the
    rendered text are the template's. A mark passes what templates do with texts: trim, split, join, quote.

    Args:
        special: Matches the text of any special token.
    """

    def __init__(self, special: re.Pattern[str]) -> None:
        self._special = special
        self._nonce = str(secrets.randbelow(10**12))
        self._texts: list[str] = []
        self._mark = re.compile(f"\ue000{self._nonce}:([0-9]+)\ue001")

    def marked(self, value: Any) -> Any:
        """The same JSON value with marks in its texts."""
        if isinstance(value, str):
            return self._special.sub(self._put, value)
        if isinstance(value, list):
            return [self.marked(each) for each in value]
        if isinstance(value, dict):
            return {self.marked(key): self.marked(each) for key, each in value.items()}
        return value

    def parts(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The rendered text in parts, and whether what looks like a special token in it is one."""
        end = 0
        for mark in self._mark.finditer(rendered):
            if int(mark[1]) < len(self._texts):
                if mark.start() > end:
                    yield rendered[end : mark.start()], True
                yield self._texts[int(mark[1])], False
                end = mark.end()
        if end < len(rendered):
            yield rendered[end:], True

    def _put(self, found: re.Match[str]) -> str:
        self._texts.append(found[0])
        return f"\ue000{self._nonce}:{len(self._texts) - 1}\ue001"


def parsed(raw: bytes) -> Any:
    """A JSON value.

    Raises:
        TemplateError: It is too deep.
    """
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise TemplateError("it is nested too deeply") from error
