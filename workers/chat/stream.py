"""A chat's answer on its way, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from crumplezone.workers.chat.answers.deltas import Answer, ChatDelta
from crumplezone.workers.chat.answers.parser import ChatParser, Shape
from crumplezone.workers.generate.requests.completion import Completion
from crumplezone.workers.generate.requests.jobs import Awaited
from crumplezone.workers.generate.requests.stream import Stream


@dataclass(frozen=True)
class ChatCompletion:
    """One finished answer.

    Attributes:
        message: In OpenAI's shape: ``role``, ``content``, and where there is any ``reasoning_content`` and
            ``tool_calls``, whose arguments are JSON as the model has written it.
        finish_reason: ``"tool_calls"`` if a tool is called and the text is at its end, else as in
            `Completion`.
        completion: What the model has written, as it is; also why it failed, if it did, and its reports.
    """

    message: dict[str, Any]
    finish_reason: str
    completion: Completion


def answered(completion: Completion, shape: Shape) -> ChatCompletion:
    """What a completion is as an answer."""
    answer = Answer()
    for delta in ChatParser(shape).feed(completion.text, final=True):
        answer.add(delta)
    reason = completion.finish_reason
    if reason == "stop" and answer.has_calls:
        reason = "tool_calls"
    return ChatCompletion(answer.message(), reason, completion)


class ChatStream(Awaited[ChatCompletion]):
    """An answer on its way: the future of its `ChatCompletion`, and an iterator over its deltas.

    Args:
        stream: Of its text.
        shape: What is looked for in that.

    Attributes:
        prompt: The messages as the model reads them.
    """

    def __init__(self, stream: Stream, shape: Shape, prompt: str) -> None:
        super().__init__()
        self._stream, self._shape, self.prompt = stream, shape, prompt
        stream.add_done_callback(self._finish)

    def cancel(self) -> bool:
        """Cancel it: the place of its sequence is given to another. False: it is done already."""
        return self._stream.cancel()

    def check(self) -> None:
        """Raise `UsageError` where a wait would have no end."""
        self._stream.check()

    def __iter__(self) -> Iterator[ChatDelta]:
        """What is said, as it comes: content, what was thought, and tool calls. However often, the same.

        Raises:
            CrumplezoneError: It failed, after what was yielded.
            CancelledError: It was cancelled.
        """
        parser = ChatParser(self._shape)
        for piece in self._stream:
            yield from parser.feed(piece)
        yield from parser.feed("", final=True)

    def _finish(self, done: Future[Completion]) -> None:
        if done.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif error := done.exception():
            self.set_exception(error)
        else:
            self.set_result(answered(done.result(), self._shape))
