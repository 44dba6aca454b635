"""A chat's answer on its way, and what became of it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from crumplezone.workers.chat.answers.deltas import Answer, ChatDelta
from crumplezone.workers.chat.answers.parser import ChatParser, Shape
from crumplezone.workers.generate.requests.completion import Completion
from crumplezone.workers.generate.requests.stream import Choice, Stream


@dataclass(frozen=True)
class ChatCompletion:
    """One finished answer.

    Attributes:
        message: In OpenAI's shape: ``role``, ``content``, and where there is any ``reasoning_content`` and
            ``tool_calls``, whose arguments are JSON as the model has written it.
        finish_reason: ``"tool_calls"`` if a tool is called and the text is at its end, else as in
            `Completion`.
        completion: What the model has written, as it is; also why it failed, if it did, and its reports.
        others: The other choices, where ``n`` is more than 1.
    """

    message: dict[str, Any]
    finish_reason: str
    completion: Completion
    others: tuple[ChatCompletion, ...] = ()

    @property
    def choices(self) -> tuple[ChatCompletion, ...]:
        """All ``n`` of them; the first is this one itself."""
        return (self, *self.others)


def answered(completion: Completion, shape: Shape) -> ChatCompletion:
    """What a completion, and its other choices, are as answers."""
    first, *others = (_answered(each, shape.of_choice(i)) for i, each in enumerate(completion.choices))
    return dataclasses.replace(first, others=tuple(others))


def _answered(completion: Completion, shape: Shape) -> ChatCompletion:
    answer = Answer()
    for delta in ChatParser(shape).feed(completion.text, final=True):
        answer.add(delta)
    reason = completion.finish_reason
    if reason == "stop" and answer.has_calls:
        reason = "tool_calls"
    return ChatCompletion(answer.message(), reason, completion)


class ChatChoice:
    """One answer, piece by piece as it comes; also with ``async for``."""

    def __init__(self, choice: Choice, shape: Shape) -> None:
        self._choice, self._parser = choice, ChatParser(shape)

    def __iter__(self) -> Iterator[ChatDelta]:
        """What is said: content, what was thought, and tool calls.

        Raises:
            CrumplezoneError: It failed, after what was yielded.
            CancelledError: It was cancelled.
        """
        for piece in self._choice:
            yield from self._parser.feed(piece)
        yield from self._parser.feed("", final=True)

    async def __aiter__(self) -> AsyncIterator[ChatDelta]:
        """As iterating."""
        async for piece in self._choice:
            for delta in self._parser.feed(piece):
                yield delta
        for delta in self._parser.feed("", final=True):
            yield delta


class ChatStream:
    """An answer on its way, like a future, and an iterator over its deltas.

    It can be awaited, and iterated over with ``async for``. It is cancelled as a `Stream` is: by `cancel`, at
    the end of an ``async with``, and when nobody holds it any more, unless it has a callback.

    Args:
        stream: Of its text.
        shape: What is looked for in that.
        prompt: The messages as the model reads them.

    Attributes:
        prompt: The messages as the model reads them.
        choices: Each of the ``n`` answers, to iterate over; that of the stream is the first.
    """

    def __init__(self, stream: Stream, shape: Shape, prompt: str) -> None:
        self._stream, self._shape, self.prompt = stream, shape, prompt
        texts = enumerate(stream.choices)
        self.choices = tuple(ChatChoice(choice, shape.of_choice(i)) for i, choice in texts)

    @property
    def completion(self) -> ChatCompletion:
        """What has been made so far; of an answer that was cancelled, all that will be."""
        return answered(self._stream.completion, self._shape)

    def result(self, timeout: float | None = None) -> ChatCompletion:
        """Wait for the answer, so many seconds at most.

        Raises:
            TimeoutError: They are over; it goes on.
            CancelledError: It was cancelled.
            UsageError: This thread is to do it.
        """
        return answered(self._stream.result(timeout), self._shape)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise, for which it waits as that does."""
        return self._stream.exception(timeout)

    def done(self) -> bool:
        """Whether there will be no more."""
        return self._stream.done()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._stream.cancelled()

    def cancel(self) -> bool:
        """Give it up, if it is not done. `completion` has what was made."""
        return self._stream.cancel()

    def add_done_callback(self, fn: Callable[[ChatStream], object]) -> None:
        """Have something called with this when it is done. From now on it is held until then."""
        self._stream.add_done_callback(lambda _: fn(self))

    def __iter__(self) -> Iterator[ChatDelta]:
        """See `ChatChoice`."""
        return iter(self.choices[0])

    def __aiter__(self) -> AsyncIterator[ChatDelta]:
        """See `ChatChoice`."""
        return self.choices[0].__aiter__()

    def __await__(self) -> Generator[Any, None, ChatCompletion]:
        """The answer. A task that is cancelled while it waits cancels it."""
        completion = yield from self._stream.__await__()
        return answered(completion, self._shape)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
