"""Reasoning and tool calls in what a model says, found as it comes. Knows no process; tolerates anything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from crumplezone.workers.chat.answers.deltas import ChatDelta, ToolCallDelta
from crumplezone.workers.chat.answers.scanner import EndError, Reading, Scanner
from crumplezone.workers.chat.families import END_THINK, GENERIC, MISTRAL, THINK, Family

_ANYTHING = re.compile(r".*", re.DOTALL)
_NAME = re.compile(r"[\w.-]*", re.ASCII)
_NAME_MAX = 64
_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters")
_KEYS = {*_NAMES, *_ARGUMENTS, "type", "id"}


@dataclass(frozen=True)
class Shape:
    """What is looked for in an answer.

    Attributes:
        family: How tools are called.
        tools: Names of those that may be; none: what looks like a call is content.
        thinking: Whether the prompt ends within what is thought.
        key: Of the ids of tool calls: the same gives the same.
    """

    family: Family = GENERIC
    tools: Collection[str] = ()
    thinking: bool = False
    key: str = ""

    def of_choice(self, index: int) -> Shape:
        """The same for one of several choices: their calls have other ids."""
        return dataclasses.replace(self, key=f"{self.key} {index}")

    def call_id(self, index: int) -> str:
        """Of the call with this number. Mistral's templates take nine letters and digits, no others."""
        digest = hashlib.blake2b(f"{self.key} {index}".encode(), digest_size=12).hexdigest()
        return digest[:9] if self.family is MISTRAL else f"call_{digest}"


class _NoCallError(Exception):
    """What looked like a tool call is none."""


class _Call:
    """A tool call on its way: told of once its name is known."""

    def __init__(self) -> None:
        self.name = ""
        self.opened = False
        self.waiting: list[str] = []  # arguments that came before the name


class ChatParser:
    """Cuts an answer into `ChatDelta`. However it is cut into pieces, the same comes out.

    Args:
        shape: What is looked for.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape, self._scanner = shape, Scanner()
        self._deltas: list[ChatDelta] = []
        self._spaces: list[str] = []  # behind the latest content: dropped if a call follows
        self._n_calls = 0
        self._parsing = self._answer()
        next(self._parsing)

    def feed(self, piece: str, *, final: bool = False) -> list[ChatDelta]:
        """What another piece of the text adds; after the final one there is no more."""
        self._scanner.feed(piece, final=final)
        next(self._parsing, None)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _answer(self) -> Reading[None]:
        yield
        yield from self._reasoning()
        if self._shape.tools:
            yield from self._leading()
            while self._shape.family.mark and (
                yield from self._scanner.until(self._shape.family.mark, self._say)
            ):
                yield from self._calls(self._shape.family.mark)
        yield from self._scanner.every(_ANYTHING, self._say)
        self._flush()

    def _reasoning(self) -> Reading[None]:
        """What is thought at the beginning, without the white space around it."""
        scanner, spaces = self._scanner, list[str]()
        yield from scanner.every(re.compile(r"\s*"), spaces.append)
        if not (yield from scanner.match(THINK)) and not self._shape.thinking:
            self._spaces += spaces
            return
        yield from scanner.spaces()
        held = list[str]()

        def think(text: str) -> None:
            if body := text.rstrip():
                self._deltas.append(ChatDelta(reasoning_content="".join([*held, body])))
                held.clear()
            held.append(text[len(body) :])

        yield from scanner.until(END_THINK, think)
        yield from scanner.spaces()

    def _leading(self) -> Reading[None]:
        """Calls at the beginning; nothing has to announce those of tools that there are."""
        scanner, mark = self._scanner, self._shape.family.mark
        if mark and (yield from scanner.match(mark)):
            yield from self._calls(mark)
            return
        first = yield from scanner.peek()
        named = self._shape.family.named and first and _NAME.fullmatch(first)
        if first and (first in "{[" or named):
            yield from self._calls("", bare=True)

    def _calls(self, before: str, *, bare: bool = False) -> Reading[None]:
        """One call or several, after what announces them; what turns out to be none is content."""
        scanner = self._scanner
        scanner.record()
        try:
            yield from scanner.spaces()
            first = yield from scanner.peek()
            if first == "[":
                yield from self._list(bare)
            elif first == "{":
                yield from self._object(bare)
                while (yield from self._another()):
                    yield from self._object(bare)
            else:
                yield from self._named(bare)
        except (_NoCallError, EndError):
            told = scanner.recorded()
            if not self._opened or told:
                self._say((before if not self._opened else "") + told)
            self._opened = False
            return
        self._opened = False
        scanner.recorded()
        yield from scanner.spaces()
        if self._shape.family.end and (yield from scanner.match(self._shape.family.end)):
            yield from scanner.spaces()

    def _another(self) -> Reading[bool]:
        """Whether another object follows, behind a semicolon or white space."""
        scanner = self._scanner
        yield from scanner.spaces()
        if (yield from scanner.match(";")):
            yield from scanner.spaces()
        scanner.record()
        return (yield from scanner.peek()) == "{"

    def _list(self, bare: bool) -> Reading[None]:
        scanner = self._scanner
        scanner.take(1)
        while True:
            yield from scanner.spaces()
            if (yield from scanner.peek()) != "{":
                raise _NoCallError
            yield from self._object(bare)
            scanner.record()
            yield from scanner.spaces()
            if not (yield from scanner.match(",")):
                break
        if not (yield from scanner.match("]")):
            raise _NoCallError

    _opened = False  # whether a call was told of since what announced it

    def _object(self, bare: bool) -> Reading[None]:
        """A JSON object with the name of a tool and its arguments."""
        scanner, call, first = self._scanner, _Call(), True
        scanner.take(1)
        while True:
            yield from scanner.spaces()
            if (yield from scanner.peek()) != '"':
                break
            key = _decoded((yield from scanner.string()))
            if bare and first and key not in _KEYS:
                raise _NoCallError
            first = False
            yield from scanner.spaces()
            if not (yield from scanner.match(":")):
                raise _NoCallError
            yield from scanner.spaces()
            yield from self._member(call, key, bare)
            yield from scanner.spaces()
            if not (yield from scanner.match(",")):
                break
        if not call.name or not (yield from scanner.match("}")):
            raise _NoCallError
        self._open(call)
        if not call.waiting:
            self._argue("{}")

    def _member(self, call: _Call, key: Any, bare: bool) -> Reading[None]:
        scanner = self._scanner
        first = yield from scanner.peek()
        if key in _NAMES and not call.name and first == '"':
            name = _decoded((yield from scanner.string()))
            if not isinstance(name, str) or not name or (bare and name not in self._shape.tools):
                raise _NoCallError
            call.name = name
        elif key in _ARGUMENTS and not call.opened and first:
            yield from self._arguments(call, first)
        else:
            yield from scanner.value(lambda _: None)

    def _arguments(self, call: _Call, first: str) -> Reading[None]:
        """The arguments of a call, told at once if its name is known."""
        scanner, whole = self._scanner, list[str]()
        if first in "{[":
            if call.name:
                self._open(call)
                call.waiting.append("")
                yield from scanner.value(self._argue)
            else:
                yield from scanner.value(call.waiting.append)
            return
        yield from scanner.value(whole.append)
        value = _decoded("".join(whole))
        if isinstance(value, str):  # JSON within JSON
            call.waiting.append(value)
        elif value is not None:
            call.waiting.append("".join(whole))
        if call.name and call.waiting:
            self._open(call)

    def _named(self, bare: bool) -> Reading[None]:
        """The name of a tool, perhaps an id, and its arguments."""
        scanner, parts = self._scanner, list[str]()
        if not self._shape.family.named:
            raise _NoCallError
        n = yield from scanner.every(_NAME, parts.append, _NAME_MAX)
        name = "".join(parts)
        if not 0 < n <= _NAME_MAX or (bare and name not in self._shape.tools):
            raise _NoCallError
        if (yield from scanner.match("[CALL_ID]")):
            yield from scanner.every(_NAME, lambda _: None, _NAME_MAX)
        yield from scanner.match("[ARGS]")
        yield from scanner.spaces()
        if (yield from scanner.peek()) != "{":
            raise _NoCallError
        call = _Call()
        call.name = name
        yield from self._arguments(call, "{")

    def _open(self, call: _Call) -> None:
        """Tell of a call."""
        if call.opened:
            return
        call.opened = self._opened = True
        self._scanner.recorded()
        self._spaces.clear()
        index = self._n_calls
        self._n_calls += 1
        call_id = self._shape.call_id(index)
        self._deltas.append(ChatDelta(tool_call=ToolCallDelta(index, call_id, call.name)))
        for text in call.waiting:
            self._argue(text)

    def _argue(self, text: str) -> None:
        if text:
            delta = ToolCallDelta(self._n_calls - 1, arguments=text)
            self._deltas.append(ChatDelta(tool_call=delta))

    def _say(self, text: str) -> None:
        """Content; white space at its end waits for more."""
        body = text.rstrip()
        if body:
            self._flush()
            self._deltas.append(ChatDelta(content=body))
        if len(body) < len(text):
            self._spaces.append(text[len(body) :])

    def _flush(self) -> None:
        if self._spaces:
            self._deltas.append(ChatDelta(content="".join(self._spaces)))
            self._spaces.clear()


def _decoded(text: str) -> Any:
    """A JSON value, or None."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
