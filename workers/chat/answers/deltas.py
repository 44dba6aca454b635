"""What a chat's answer is made of: pieces as they come, and the message that they become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
        index: Which call of the message, from 0.
        id: Of the call; empty in all but its first piece.
        name: Of the tool; likewise.
        arguments: More of its arguments, which are a JSON text.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class ChatDelta:
    """A piece of an answer: of one of the three.

    Attributes:
        content: More of what is said.
        reasoning_content: More of what was thought before (``<think>``).
        tool_call: More of a tool call.
    """

    content: str = ""
    reasoning_content: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass
class _ToolCall:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Answer:
    """The message that deltas become."""

    def __init__(self) -> None:
        self._content, self._reasoning = list[str](), list[str]()
        self._calls: list[_ToolCall] = []

    def add(self, delta: ChatDelta) -> None:
        """One more piece."""
        self._content.append(delta.content)
        self._reasoning.append(delta.reasoning_content)
        if piece := delta.tool_call:
            if piece.index == len(self._calls):
                self._calls.append(_ToolCall(piece.id, piece.name))
            self._calls[piece.index].arguments.append(piece.arguments)

    @property
    def has_calls(self) -> bool:
        """Whether a tool is called."""
        return bool(self._calls)

    def message(self) -> dict[str, Any]:
        """In OpenAI's shape; ``reasoning_content`` and ``tool_calls`` are there where there is any."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._calls:
            message["content"] = content or None
            message["tool_calls"] = [call.told() for call in self._calls]
        return message
