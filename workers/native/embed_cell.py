"""Child side: a context that pools, many whole texts per native call. Only cells import this module.

Facts are those of llama.cpp 0c1e57098 (llama-cpp-python 0.3.36), include/llama.h unless noted.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Literal

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy as np

from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.native.batch import BatchPacker, batch_arrays
from crumplezone.workers.native.model import ContextError, context_params, describe, model_of
from crumplezone.workers.protocol.arrays import BatchArrays
from crumplezone.workers.protocol.embed import (
    TOKENS_OVER,
    Embed,
    EmbedConfig,
    Embedded,
    EmbedInfo,
    EmbedRequest,
    Reshape,
    TextsTokenized,
    TokenizeTexts,
    text_shapes,
    vector_shapes,
)
from crumplezone.workers.protocol.messages import Warm, Warmed

_INT32 = ctypes.POINTER(ctypes.c_int32)
_POOLING: dict[Literal["mean", "cls", "last", "rank"], int] = {
    "mean": C.LLAMA_POOLING_TYPE_MEAN,
    "cls": C.LLAMA_POOLING_TYPE_CLS,
    "last": C.LLAMA_POOLING_TYPE_LAST,
    "rank": C.LLAMA_POOLING_TYPE_RANK,
}


class EmbedCell:
    """One model and one context for embeddings.

    Args:
        config: An encoded `EmbedConfig`.
        room: The cell's arena.
        preloaded: What `preload` returned, in a forked cell.

    Raises:
        LoadError: The model or the context could not be made; the message is llama.cpp's own.
    """

    request_type: Any = EmbedRequest

    def __init__(self, config: msgspec.Raw, room: Room, preloaded: Any = None) -> None:
        self._config = msgspec.msgpack.decode(config, type=EmbedConfig)
        self._packer = BatchPacker()
        self._arena, self._recorder = room.arena, room.recorder
        loaded = model_of(preloaded, self._config.file(), room)
        self.model, self._native_logs = loaded.pointer, loaded.native_logs
        # llama.cpp warns of a pooling that is not the model's own: here it was asked for, or there is none.
        logging.getLogger("llama.cpp").addFilter(lambda line: "default pooling_type" not in line.getMessage())
        self._vocab = C.llama_model_get_vocab(self.model)
        self._make_context()

    def info(self) -> EmbedInfo:
        """Facts of the model and of the context."""
        return self._info

    def handle(self, request: EmbedRequest) -> msgspec.Struct:
        """Answer one request."""
        match request:
            case TokenizeTexts():
                self._tokenize(request)
                return TextsTokenized()
            case Embed():
                return Embedded(self._embed(request))
            case Warm():
                self._warm()
                return Warmed()
            case Reshape():
                C.llama_free(self.context)
                self._config = request.config
                self._make_context()
                return self._info

    def run(self, arrays: BatchArrays) -> int:
        """One native call over a batch."""
        n_tokens = len(arrays.tokens)
        with self._recorder.phase("decode", n_tokens):
            # Of models that are encoders only too: llama_decode is llama_encode where there is no memory.
            return int(C.llama_decode(self.context, self._packer.pack(arrays, 0, n_tokens)))

    def _warm(self) -> None:
        """Have llama.cpp make what it makes at the first call."""
        one = batch_arrays(1)
        one.outputs[:] = 1
        self.run(one)

    def _make_context(self) -> None:
        config, params = self._config, context_params(self._config)
        params.embeddings = True
        params.pooling_type = _POOLING[config.pooling] if config.pooling else C.LLAMA_POOLING_TYPE_UNSPECIFIED
        with self._recorder.phase("context", config.n_ctx):
            self.context = C.llama_init_from_model(self.model, params)
            if self.context and C.llama_pooling_type(self.context) == C.LLAMA_POOLING_TYPE_NONE:
                C.llama_free(self.context)
                params.pooling_type = C.LLAMA_POOLING_TYPE_MEAN
                self.context = C.llama_init_from_model(self.model, params)
        if not self.context:
            raise ContextError(self._native_logs.last_error or "llama_init_from_model returned NULL")
        self._memory = C.llama_get_memory(self.context)
        pooling = C.llama_pooling_type(self.context)
        self._info = EmbedInfo(
            **msgspec.structs.asdict(describe(self.model, self.context)),
            pooling=next(name for name, value in _POOLING.items() if value == pooling),
            cached=bool(self._memory),
        )

    def _tokenize(self, request: TokenizeTexts) -> None:
        """The tokens of all texts, one text behind the other."""
        shapes = text_shapes(request.n_texts, request.n_bytes)
        sizes, counts, raw, tokens = self._arena.arrays(shapes)
        texts = raw.tobytes()
        begin = n_tokens = 0
        with self._recorder.phase("tokenize", request.n_bytes):
            for i, size in enumerate(sizes.tolist()):
                text, room = texts[begin : begin + size], tokens[n_tokens:].ctypes.data_as(_INT32)
                # A text is data: what looks like a special token in it is text too.
                count = C.llama_tokenize(self._vocab, text, size, room, size + TOKENS_OVER, True, False)
                if count < 0:
                    raise RuntimeError(f"llama_tokenize wants room for {-count} tokens")
                counts[i] = count
                begin, n_tokens = begin + size, n_tokens + count

    def _embed(self, request: Embed) -> int:
        n_embd = self._info.n_embd
        shapes = vector_shapes(request.n_tokens, request.n_texts, n_embd)
        *arrays, flat = self._arena.arrays(shapes)
        if self._memory:  # emptied, but not zeroed: what is left is masked, and finite
            C.llama_memory_clear(self._memory, False)
        rc = self.run(BatchArrays(*arrays))
        if rc == 0:
            with self._recorder.phase("copy", request.n_texts):
                for seq_id, vector in enumerate(flat.reshape(request.n_texts, n_embd)):
                    pooled = C.llama_get_embeddings_seq(self.context, seq_id)
                    if not pooled:
                        raise RuntimeError(f"llama.cpp has no vector of sequence {seq_id}")
                    vector[:] = np.ctypeslib.as_array(pooled, (n_embd,))
        return rc
