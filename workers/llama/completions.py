"""The half of `Llama` that makes text and embeddings: llama_cpp's signatures, one task each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from crumplezone.errors import InputError
from crumplezone.workers.llama.calls.client import decoded
from crumplezone.workers.llama.calls.session import Session
from crumplezone.workers.llama.calls.task import Task
from crumplezone.workers.llama.objects import grammar_of

Json = dict[str, Any]
Stop = str | list[str] | None
Processors = Iterable[Callable[..., Any]] | None
Criteria = Callable[..., Any] | None

JSON = decoded(Json)
_NO_STOP: list[str] = []


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise InputError("an argument", value, "cannot cross into the cell; pass numbers, text, lists and dicts")


def task_of(method: str, arguments: Json) -> Task:
    """A task of a method's ``locals()``: what can be copied, and apart from it what cannot.

    Raises:
        InputError: Something in it is neither.
    """
    args = {name: value for name, value in arguments.items() if name not in {"self", "__class__"}}
    grammar = grammar_of(args.pop("grammar", None))
    processors, criteria = args.pop("logits_processor", None), args.pop("stopping_criteria", None)
    # A copy: the caller may change its lists while a stream is suspended, and the call be made again.
    copied = msgspec.msgpack.decode(msgspec.msgpack.encode(args, enc_hook=_plain))
    return Task(method, copied, grammar, processors, criteria)


class Completions:
    """What needs no more than a session."""

    _session: Session

    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: Stop = _NO_STOP,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Criteria = None,
        logits_processor: Processors = None,
        grammar: Any = None,
        logit_bias: dict[int, float] | None = None,
    ) -> Json | Iterator[Json]:
        """Generate text from a prompt; the parameters are those of ``llama_cpp.Llama.create_completion``.

        Raises:
            InputError: The grammar does not compile, or an argument cannot cross into the cell.
            SequenceError: Every attempt crashed, the last one with one thread, token by token.
        """
        task = task_of("create_completion", locals())
        if stream:
            return self._session.stream(task, JSON)
        answer: Json = self._session.call(task, JSON)
        return answer

    if TYPE_CHECKING:
        __call__ = create_completion
    else:

        @functools.wraps(create_completion, assigned=())
        def __call__(self, *args: Any, **kwargs: Any) -> Json | Iterator[Json]:
            """`create_completion`, also where a subclass has another one."""
            return self.create_completion(*args, **kwargs)

    def create_chat_completion(
        self,
        messages: list[Json],
        functions: list[Json] | None = None,
        function_call: str | Json | None = None,
        tools: list[Json] | None = None,
        tool_choice: str | Json | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: Stop = _NO_STOP,
        seed: int | None = None,
        response_format: Json | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Processors = None,
        grammar: Any = None,
        logit_bias: dict[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Json | Iterator[Json]:
        """Answer messages; the parameters are those of ``llama_cpp.Llama.create_chat_completion``.

        Raises:
            InputError: The chat format is unknown, or as for `create_completion`.
            SequenceError: As for `create_completion`.
        """
        task = task_of("create_chat_completion", locals())
        if not stream:
            answer: Json = self._session.call(task, JSON)
            return answer
        self._session.open(task)  # the original formats the messages now
        return self._session.stream(task, JSON)

    def create_chat_completion_openai_v1(self, *args: Any, **kwargs: Any) -> Any:
        """`create_chat_completion`, as the objects of the openai package.

        Raises:
            ImportError: It is not installed.
        """
        try:
            chat: Any = importlib.import_module("openai.types.chat")
        except ImportError:
            raise ImportError(
                "create_chat_completion_openai_v1 needs the openai package: `pip install openai`"
            ) from None
        answer = self.create_chat_completion(*args, **kwargs)
        if isinstance(answer, dict):
            return chat.ChatCompletion(**answer)
        return (chat.ChatCompletionChunk(**chunk) for chunk in answer)

    def create_embedding(self, input: str | list[str], model: str | None = None) -> Json:  # noqa: A002 - the original's
        """Embed a text or several, in OpenAI's form."""
        done: Json = self._session.call(task_of("create_embedding", locals()), JSON)
        return done

    def embed(
        self,
        input: str | list[str],  # noqa: A002 - the original's
        normalize: bool = False,
        truncate: bool = True,
        return_count: bool = False,
    ) -> Any:
        """Embed a text or several.

        Returns:
            For each text n_embd numbers, or without pooling as many for each token; with ``return_count``, a
            tuple of that and the number of tokens.
        """
        done = self._session.call(task_of("embed", locals()), decoded(list[Any]))
        return tuple(done) if return_count else done
