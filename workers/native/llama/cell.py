"""Child side: ``llama_cpp.Llama`` behind typed requests. Only cells import this module."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import msgspec
import numpy as np
from llama_cpp.llama import LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry
from llama_cpp.llama_grammar import LlamaGrammar

from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.native import memory as native_memory
from crumplezone.workers.native.grammar import GrammarError
from crumplezone.workers.native.llama.replay import ReplayableLlama
from crumplezone.workers.native.llama.seed import LlamaSeed
from crumplezone.workers.native.model import ContextError, LoadError, NativeLogs, describe
from crumplezone.workers.protocol.llama import (
    INLINE_MAX,
    Fetch,
    Grammar,
    Invoke,
    LlamaCall,
    LlamaConfig,
    LlamaInfo,
    Next,
    Note,
    Nothing,
    Output,
    Query,
    Request,
    Restore,
)
from crumplezone.workers.protocol.messages import Save, Warm, Warmed

_METHODS = {
    "create_completion",
    "create_chat_completion",
    "create_embedding",
    "embed",
    "generate",
    "eval",
    "sample",
    "reset",
    "scores_bytes",
    "state_bytes",
    "set_state",
}
_QUERIES = {"tokenize", "detokenize", "metadata_items"}


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot leave the cell")


class LlamaCell:
    """The service.

    Args:
        config: An encoded `LlamaConfig`.
        room: The cell's.
        preloaded: What `preload` returned, in a forked cell.

    Raises:
        LoadError: The model or the context could not be made; the message is llama.cpp's own.
    """

    request_type: Any = Request

    def __init__(self, config: msgspec.Raw, room: Room, preloaded: Any = None) -> None:
        self._room, self._saved = room, b""
        native_logs, wanted = NativeLogs(room), msgspec.msgpack.decode(config, type=LlamaConfig)
        model = preloaded.model if isinstance(preloaded, LlamaSeed) else None
        with room.recorder.phase("load"):
            try:
                self._llama = ReplayableLlama(wanted, room, native_logs, model)
            except ValueError as error:
                kind = ContextError if "llama_context" in str(error) else LoadError
                raise kind(native_logs.last_error or str(error)) from error
        if self._llama.lora_path and not self._llama._lora_adapter:  # noqa: SLF001 - the original misses the NULL
            raise LoadError(f"LoRA {self._llama.lora_path}: {native_logs.last_error or 'refused'}")
        self._encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
        self._running: Iterator[Any] | None = None
        self._parcel = b""

    def info(self) -> LlamaInfo:
        """Facts of the loaded model."""
        llama = self._llama
        registry: Any = LlamaChatCompletionHandlerRegistry
        return LlamaInfo(
            cell=msgspec.structs.replace(describe(llama.model, llama.ctx), n_batch=llama.n_batch),
            n_embd=llama.n_embd(),
            n_ctx=llama.n_ctx(),
            n_rows=len(llama.scores),
            n_seq_max=llama.context_params.n_seq_max,
            pooling_type=int(llama.pooling_type()),
            token_eos=llama.token_eos(),
            token_bos=llama.token_bos(),
            token_nl=llama.token_nl(),
            chat_format=llama.chat_format,
            chat_formats=sorted({*llama._chat_handlers, *registry()._chat_handlers}),  # noqa: SLF001 - as above
        )

    def handle(self, request: Request) -> msgspec.Struct:
        """Answer one request."""
        match request:
            case Invoke():
                return self._invoke(self._call(request.n_bytes))
            case Query():
                return self._query(self._call(request.n_bytes))
            case Next():
                return self._next(request.sent)
            case Fetch():
                return self._fetch()
            case Save():
                return native_memory.save(self._llama.ctx, request.seq_id, self._room.arena)
            case Restore():
                self._saved = self._bytes(request.n_bytes)
                return Nothing()
            case Warm():
                self._llama.warm()
                return Warmed()

    def _bytes(self, n_bytes: int) -> bytes:
        (raw,) = self._room.arena.arrays([("u1", n_bytes)])
        return raw.tobytes()

    def _call(self, n_bytes: int) -> LlamaCall:
        return msgspec.msgpack.decode(self._bytes(n_bytes), type=LlamaCall)

    def _query(self, job: LlamaCall) -> Output:
        if job.method not in _QUERIES:
            raise ValueError(f"{job.method} is no query")
        return self._output(getattr(self._llama, job.method)(**job.args), note=Note())

    def _invoke(self, job: LlamaCall) -> Output:
        if job.method not in _METHODS:
            raise ValueError(f"{job.method} is no method of a Llama")
        if isinstance(self._running, Generator):
            self._running.close()
        self._running = None
        saved, self._saved = self._saved, b""
        self._llama.begin(job, saved)
        args = dict(job.args)
        if job.grammar is not None:
            args["grammar"] = self._grammar(job.grammar)
        if job.processors:
            args["logits_processor"] = LogitsProcessorList([self._llama.process])
        if job.criteria:
            args["stopping_criteria"] = StoppingCriteriaList([self._llama.judge])
        value = getattr(self._llama, job.method)(**args)
        if isinstance(value, Iterator):
            self._running = value
            return self._output(None, end=True)
        return self._output(value)

    def _grammar(self, grammar: Grammar) -> Any:
        if not grammar.schema:
            made = LlamaGrammar.from_string(grammar.text)
            made._root = grammar.root  # noqa: SLF001 - the original offers no other way
            return made
        try:
            return LlamaGrammar.from_json_schema(grammar.text)
        except Exception as error:
            raise GrammarError(f"cannot be made into a grammar: {type(error).__name__}: {error}") from error

    def _next(self, sent: list[int] | None) -> Output:
        assert self._running is not None
        try:
            if sent is None:
                return self._output(next(self._running))
            assert isinstance(self._running, Generator)
            return self._output(self._running.send(sent))
        except StopIteration:
            self._running = None
            return self._output(None, end=True)

    def _output(self, value: object, *, end: bool = False, note: Note | None = None) -> Output:
        raw = value if isinstance(value, bytes) else self._encode(value)
        self._parcel = raw if len(raw) > INLINE_MAX else b""
        llama = self._llama
        inline = b"" if self._parcel else raw
        history = llama._history  # noqa: SLF001 - ours
        n_tokens = len(history) if history else llama.n_tokens
        note = note or llama.journal.take()  # a query brings none: it may come between two
        return Output(inline, len(self._parcel), end, note, n_tokens, llama._seed)  # noqa: SLF001 - the original's

    def _fetch(self) -> Nothing:
        (into,) = self._room.arena.arrays([("u1", len(self._parcel))])
        into[:] = np.frombuffer(self._parcel, np.uint8)
        self._parcel = b""
        return Nothing()
