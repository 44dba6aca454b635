"""Child side: llama.cpp behind typed requests. Only cells import this module.

Facts are those of llama.cpp 0c1e57098 (llama-cpp-python 0.3.36), include/llama.h unless noted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API
import msgspec
import numpy.typing as npt

from crumplezone.sandbox.child.loop import Room
from crumplezone.workers.native import memory as native_memory
from crumplezone.workers.native.batch import BatchPacker, address, batch_arrays
from crumplezone.workers.native.engine.engine import Engine
from crumplezone.workers.native.model import describe, make_context, model_of
from crumplezone.workers.protocol.arrays import BatchArrays, batch_shapes
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.generate.messages import Generate, Generated, Join
from crumplezone.workers.protocol.messages import (
    Adapt,
    Adapted,
    Decode,
    Decoded,
    Detokenize,
    Detokenized,
    Load,
    MemoryOperation,
    Remembered,
    Request,
    Resize,
    Save,
    Saved,
    Tokenize,
    Tokenized,
    Warm,
    Warmed,
    row_shapes,
)

_NOT_ADDED = {-1: "the batch is full", -2: "no such token", -3: "no such sequence"}


class DecodeCell:
    """One model and one context.

    Args:
        config: An encoded `CellConfig`.
        room: The cell's arena.
        preloaded: What `preload` returned, in a forked cell.

    Raises:
        LoadError: The model or the context could not be made; the message is llama.cpp's own.
    """

    request_type: Any = Request

    def __init__(self, config: msgspec.Raw, room: Room, preloaded: Any = None) -> None:
        self.config = msgspec.msgpack.decode(config, type=CellConfig)
        self._arena, self.recorder = room.arena, room.recorder
        loaded = model_of(preloaded, self.config.file(), room)
        self._loaded, self.model, self.logs = loaded, loaded.pointer, loaded.native_logs
        self.vocab = C.llama_model_get_vocab(self.model)
        with self.recorder.phase("context", self.config.n_ctx):
            self.context = make_context(self._loaded, self.config)
        self.memory = C.llama_get_memory(self.context)
        self._info = describe(self.model, self.context)
        self._engine = Engine(self, self._arena.nudged)
        self._adapters = native_memory.NativeAdapters(self.model)
        self._unsettled = False  # copies and shifts that llama.cpp has noted down, but not done
        self._embeddings = False  # whether llama.cpp is to compute them
        self._packer = BatchPacker()

    def info(self) -> CellInfo:
        """Facts of the loaded model."""
        return self._info

    def handle(self, request: Request) -> msgspec.Struct:
        """Answer one request."""
        if not isinstance(request, Generate | Tokenize | Detokenize):
            self._engine.reset()  # what it knows of the memory will not be true
        match request:
            case Decode():
                return self._decode(request)
            case Warm():
                self._warm()
                return Warmed()
            case Tokenize() | Detokenize():
                return self._translated(request)
            case Generate():
                return self._generate(request)
            case MemoryOperation():
                with self.recorder.phase(request.name, request.seq_id):
                    self._unsettled |= request.name in ("copy", "shift")
                    return self._remembered(native_memory.operate(self.memory, request))
            case Save() | Load():
                self._settle()
                return self._stated(request)
            case Resize():
                self._resize(request)
                return self._info
            case Adapt():
                self._adapt(request)
                return Adapted()

    def _translated(self, request: Tokenize | Detokenize) -> Tokenized | Detokenized:
        if isinstance(request, Tokenize):
            return Tokenized(self._tokenize(request))
        return Detokenized([self._detokenize(tokens) for tokens in request.tokens])

    def copy(self, source: int, target: int) -> None:
        """Put a copy of a sequence in the place of another. llama.cpp notes it down, for the next decode.

        Only whole: across streams llama.cpp aborts on a part of one (llama_kv_cache::seq_cp).
        """
        with self.recorder.phase("copy", source):
            # In a stream that sequences share, the copy would only be added (llama_kv_cache::seq_cp).
            C.llama_memory_seq_rm(self.memory, target, -1, -1)
            C.llama_memory_seq_cp(self.memory, source, target, -1, -1)
        self._unsettled = True

    def clear(self) -> None:
        """Empty the memory of every sequence. Encoder-only models have none."""
        if self.memory:
            C.llama_memory_clear(self.memory, True)

    def run(
        self,
        arrays: BatchArrays,
        begin: int,
        end: int,
        *,
        n_embd: int = 0,
        encode: bool = False,
        process: bool = False,
        nulls: Sequence[str] = (),
    ) -> int:
        """One native call over tokens ``begin`` to ``end`` of a batch laid out as `batch_shapes`."""
        if process:
            return self._process(arrays.part(begin, end))
        batch = self._packer.pack(arrays, begin, end, n_embd=n_embd, nulls=nulls)
        what, call = ("encode", C.llama_encode) if encode else ("decode", C.llama_decode)
        with self.recorder.phase(what, end - begin):
            rc = int(call(self.context, batch))
        self._unsettled &= bool(rc) or encode
        return rc

    def _process(self, arrays: BatchArrays) -> int:
        """The same by ``llama_process``, each token of one sequence."""
        if not hasattr(C, "llama_process"):
            raise RuntimeError("this llama.cpp has no llama_process")
        tokens, positions, seq_ids, outputs, *_ = (array.tolist() for array in arrays)
        batch = C.llama_batch_ext_init(self.context)
        try:
            with self.recorder.phase("build", len(tokens)):
                for i, (seq_id, token) in enumerate(zip(seq_ids, tokens, strict=True)):
                    added = C.llama_batch_ext_add_token(batch, seq_id, token)
                    if added < 0:
                        why = _NOT_ADDED.get(added, f"rc {added}")
                        raise RuntimeError(f"llama_batch_ext_add_token refuses token {i} of the batch: {why}")
                    C.llama_batch_ext_set_pos(batch, added, ctypes.byref(C.llama_pos(positions[i])))
                    C.llama_batch_ext_set_output_logits(batch, added, bool(outputs[i]))
            with self.recorder.phase("process", len(tokens)):
                rc = int(C.llama_process(self.context, C.LLAMA_PROCESS_TYPE_DECODE, batch))
        finally:
            C.llama_batch_ext_free(batch)
        self._unsettled &= bool(rc)
        return rc

    def _decode(self, request: Decode) -> Decoded:
        with self.recorder.phase("build", request.n_tokens):
            shapes = batch_shapes(request.n_tokens, request.n_seq_ids, request.n_embd)
            *arrays, logits, embeddings = self._arena.arrays([*shapes, *row_shapes(request, self._info)])
            batch = BatchArrays(*arrays)
            wanted = batch.outputs.copy()
            self._want_embeddings(request.embeddings)
            if request.embeddings:  # llama.cpp then insists on every token being an output, and warns
                batch.outputs[:] = 1
            if request.fresh:
                self.clear()
        rc = self.run(
            batch,
            0,
            request.n_tokens,
            n_embd=request.n_embd,
            encode=request.encode,
            process=request.process,
            nulls=request.nulls,
        )
        if rc == 0:
            outputs = wanted.nonzero()[0].tolist()
            with self.recorder.phase("copy", len(outputs)):
                self._copy(C.llama_get_logits_ith, outputs, logits.reshape(-1, self._info.n_vocab))
                self._copy(C.llama_get_embeddings_ith, outputs, embeddings.reshape(-1, self._info.n_embd))
        return Decoded(rc, native_memory.spans(self.memory, self._sequences(set(batch.seq_ids.tolist()))))

    def _want_embeddings(self, wanted: bool) -> None:
        if wanted != self._embeddings:  # llama.cpp logs each call, and the line would go to the supervisor
            C.llama_set_embeddings(self.context, wanted)
            self._embeddings = wanted

    def _sequences(self, seq_ids: Iterable[int]) -> list[int]:
        """Those that exist: of any other, llama.cpp would abort."""
        return [seq_id for seq_id in seq_ids if 0 <= seq_id < self.config.n_seq_max]

    def _remembered(self, done: bool) -> Remembered:
        return Remembered(done, native_memory.spans(self.memory, range(self.config.n_seq_max)))

    def _settle(self) -> None:
        """Have copies and shifts done that were only noted down.

        llama.cpp does so at the next decode (llama_kv_cache::update). A state that is saved before that lacks
        them; one that is loaded is then overwritten by them. So decode a token, and remove it again.
        """
        if not self._unsettled:
            return
        ends = [C.llama_memory_seq_pos_max(self.memory, seq_id) for seq_id in range(self.config.n_seq_max)]
        seq_id = ends.index(min(ends))
        begin = ends[seq_id] + 1
        if begin and self._info.recurrent:  # of such a sequence, no single token can be removed
            raise RuntimeError("a state after a copy needs a sequence that is empty: remove one first")
        self._decode_one(seq_id, begin)  # 1, no room for it, is as good: what was noted down is done before
        C.llama_memory_seq_rm(self.memory, seq_id, begin, -1)
        self._unsettled = False

    def _decode_one(self, seq_id: int, position: int) -> None:
        one = batch_arrays(1)
        one.positions[:], one.seq_ids[:] = position, seq_id
        self.run(one, 0, 1)

    def _warm(self) -> None:
        if self.memory and not self._info.has_encoder:
            self._decode_one(0, 0)
            self.clear()

    def _stated(self, request: Save | Load) -> Saved | Remembered:
        if isinstance(request, Save):
            return native_memory.save(self.context, request.seq_id, self._arena)
        return self._load(request)

    def _load(self, request: Load) -> Remembered:
        (state,) = self._arena.arrays([("u1", request.size)])
        return self._remembered(native_memory.load(self.context, self.memory, request.seq_id, state))

    def _resize(self, request: Resize) -> None:
        C.llama_free(self.context)
        self.config = msgspec.structs.replace(self.config, n_ctx=request.n_ctx, n_seq_max=request.n_seq_max)
        self.context = make_context(self._loaded, self.config)
        self.memory = C.llama_get_memory(self.context)
        self._info = describe(self.model, self.context)
        self._engine.close()
        self._engine = Engine(self, self._arena.nudged)
        self._unsettled = self._embeddings = False

    def _adapt(self, request: Adapt) -> None:
        (vector,) = self._arena.arrays([("f4", request.n_floats)])
        self._adapters.use(self.context, request, vector, self._info.n_embd)

    def _copy(self, get: Any, outputs: list[int], rows: npt.NDArray[Any]) -> None:
        """Copy the row of each output; where none was asked for, there is no row to copy it to."""
        for i, row in zip(outputs, rows, strict=False):
            pointer = get(self.context, i)
            if not pointer:
                raise RuntimeError(f"llama.cpp has no row for output {i} of the batch")
            ctypes.memmove(address(row), pointer, row.nbytes)

    def _tokenize(self, request: Tokenize) -> int:
        n_bytes = request.n_bytes
        (text,) = self._arena.arrays([("u1", n_bytes)])
        raw = text.tobytes()
        size = n_bytes + 16  # at most one token a byte, and the special ones
        tokens = (C.llama_token * size)()
        with self.recorder.phase("tokenize", len(raw)):
            how = request.begin, request.special
            n_tokens = C.llama_tokenize(self.vocab, raw, len(raw), tokens, size, *how)
        if n_tokens < 0:
            raise RuntimeError(f"llama_tokenize wants room for {-n_tokens} tokens")
        (room,) = self._arena.arrays([("i4", n_tokens)])
        room[:] = tokens[:n_tokens]
        return int(n_tokens)

    def _detokenize(self, tokens: list[int]) -> bytes:
        ids = (C.llama_token * len(tokens))(*tokens)
        size = -C.llama_detokenize(self.vocab, ids, len(tokens), None, 0, False, True)  # what it would take
        room = ctypes.create_string_buffer(max(size, 1))
        n_bytes = C.llama_detokenize(self.vocab, ids, len(tokens), room, size, False, True)
        return room.raw[: max(n_bytes, 0)]

    def _generate(self, request: Generate) -> Generated:
        if request.reset:
            self._engine.reset()
            if self.memory:  # marked as empty, not filled with zeros: that would take a while
                C.llama_memory_clear(self.memory, False)
        self._want_embeddings(False)
        batch, encoded, prompts = request.arrays(self._arena)
        joins = msgspec.msgpack.decode(encoded.tobytes(), type=list[Join]) if prompts else []
        for seq_id in request.leaves:
            self._engine.leave(seq_id)
        for join, tokens in zip(joins, prompts, strict=True):
            self._engine.join(join, tokens.copy())
        return self._engine.generate(batch, request.steps)
