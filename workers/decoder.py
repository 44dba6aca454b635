"""`Decoder`: the front of the package. Batches and prompts go in, results come out, crashes do not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import numpy as np
import numpy.typing as npt

from crumplezone.errors import check_integer
from crumplezone.reports.store.store import directory_of
from crumplezone.sandbox.cells.zygote import Zygote
from crumplezone.workers.batch.batch import Batch
from crumplezone.workers.batch.call import DecodeOptions
from crumplezone.workers.batch.columns import LLAMA_MAX_SEQ, Columns, Int32
from crumplezone.workers.batch.ctypes_batch import read_llama_batch
from crumplezone.workers.batch.results import Result
from crumplezone.workers.batch.validate import Level, MemoryState, validate
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.cells.factory import Cells, Start
from crumplezone.workers.cells.turn import Turn, in_turn
from crumplezone.workers.chat.front import Chats
from crumplezone.workers.embed.embedder import Embedder, Embeddings
from crumplezone.workers.generate.lanes.pool import Plan
from crumplezone.workers.generate.observed import Observed
from crumplezone.workers.generate.pools import Pools
from crumplezone.workers.generate.prompts import Prompts
from crumplezone.workers.generate.requests.jobs import BatchJob
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.ladder import Ladder
from crumplezone.workers.ladder.rungs import SafeRungs
from crumplezone.workers.memory.memory import Memory
from crumplezone.workers.memory.session import MemorySession
from crumplezone.workers.model.adapters import Adapters
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.model.parameters import ContextOptions
from crumplezone.workers.model.settings import N_UBATCH, capacity, configure
from crumplezone.workers.protocol.config import INT32_MAX, CellInfo
from crumplezone.workers.text.texts import Texts

_N_SEQ_MAX = 4  # sequences of a batch, where nobody says
_WORKERS_MAX = 256
_QUEUE_MAX = 2**20


class Decoder(Prompts, Chats, Observed):
    """Native batch decoding in a supervised cell, with a safe fallback and crash reports.

    Calls are serialised: several threads may use one decoder. Close it, or use it as a context manager.

    Args:
        model: Path of a GGUF file.
        n_ctx: Tokens of context over all sequences; 0 for 1024 per sequence. Divided evenly.
        n_batch: Most tokens per native call, at least ``n_seq_max``.
        n_ubatch: Most tokens per compute pass.
        n_seq_max: Most sequences per batch, and prompts completed together, up to 256. 0: 4 for batches, and
            for prompts what this machine decodes fastest together with this model, which is measured once.
        n_threads: Threads of a cell. 0: one per available core for batches; for prompts measured, and at most
            a worker's share of the cores.
        n_gpu_layers: Layers to offload.
        workers: Cells that complete prompts and decode submitted batches side by side.
        queue_size: Most requests and batches that wait for them.
        start: How cells are started: "zygote" (forked from a process that has loaded the model), "spawn"
            (each loads it), or "auto": "spawn" with layers to offload, and where forking is not safe.
        spares: Warm cells that wait to take over from one that dies. None: 1, or 0 if each would load the
            model again.
        safe_fallback: Whether a job that the native rung cannot do goes down the ladder.
        preflight: Whether to skip native calls that are known to crash.
        deadline: Seconds until a native call counts as hung, or None.
        memory_limit: Bytes of memory, resident or shared with this process, above which a cell is killed,
            or None.
        reports: The report store; None for ``$CRUMPLEZONE_REPORTS`` or the XDG state directory.
        redact: Keep token ids, prompt text and paths out of the reports (hashes and base names instead).
        checkpoint_every: After so many tokens, keep the state of the memory instead of its tokens, so that a
            new cell is given it faster; 0: never.
        options: The other parameters of `llama_cpp.Llama` for models and contexts, with its defaults: fields
            of `ContextOptions`.

    Raises:
        ModelError: The model cannot be loaded.
        InputError: A parameter is out of range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        n_ctx: int = 0,
        n_batch: int = 2048,
        n_ubatch: int = N_UBATCH,
        n_seq_max: int = 0,
        n_threads: int = 0,
        n_gpu_layers: int = 0,
        workers: int = 1,
        queue_size: int = 4096,
        start: Start = "auto",
        spares: int | None = None,
        safe_fallback: bool = True,
        preflight: bool = True,
        deadline: float | None = 300.0,
        memory_limit: int | None = None,
        reports: str | Path | None = None,
        redact: bool = False,
        checkpoint_every: int = 0,
        **options: Unpack[ContextOptions],
    ) -> None:
        check_integer("checkpoint_every", checkpoint_every, 0, INT32_MAX)
        check_integer("workers", workers, 1, _WORKERS_MAX)
        check_integer("queue_size", queue_size, 1, _QUEUE_MAX)
        check_integer("n_seq_max", n_seq_max, 0, LLAMA_MAX_SEQ, " (LLAMA_MAX_SEQ)")
        config = configure(
            model,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max or _N_SEQ_MAX,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            **options,
        )
        limits = Limits(deadline, memory_limit)
        self._turn = Turn("decoder")
        self._reporter = reporter = Reporter(directory_of(reports), redacted=redact)
        self._cells = Cells.of(config, limits, reporter, start, spares)
        self._native = self._cells.decode_client(config)
        self._session = MemorySession(self._native, reporter, checkpoint_every)
        self._safe_rungs = SafeRungs(self._native, reporter) if safe_fallback else None
        self._ladder = Ladder(self._session, self._safe_rungs, reporter, preflight=preflight)
        plan = Plan(
            config=config,
            cells=self._cells,
            workers=workers,
            n_seq=n_seq_max,
            n_threads=n_threads,
            safe_fallback=safe_fallback,
            preflight=preflight,
            queue_size=queue_size,
        )
        self._pools = Pools(plan, self._turn)
        self._embedder: Embedder | None = None
        try:
            self._native.probe()
            self._texts = Texts(self._cells, config, self._native.info)
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> CellInfo:
        """Facts of the model and the context: n_vocab, n_embd, n_ctx_seq, has_encoder, ..."""
        return self._native.info

    @property
    def n_seq_max(self) -> int:
        """Most sequences."""
        return self._native.config.n_seq_max

    @property
    def pid(self) -> int | None:
        """Process id of the cell that holds the memory, else of a lane's; None while there is none."""
        found = self.processes
        return next(iter(found["memory"] + found["lanes"]), None)

    @property
    def processes(self) -> dict[str, list[int]]:
        """Process ids: "zygote", cells of "memory", "lanes", "embeddings" and "texts", "spares"."""
        lanes = self._pools.clients
        with self._turn.passing():
            spares = [client.spare_pids for client in (self._native, *lanes)]
            spares += [self._embedder.spare_pids] if self._embedder else []
        return {
            "zygote": _known(self._cells.zygote),
            "memory": _known(self._native),
            "lanes": _known(*lanes),
            "embeddings": _known(self._embedder),
            "texts": self._texts.pids if self._texts else [],
            "spares": [pid for pids in spares for pid in pids],
        }

    @property
    def memory(self) -> Memory:
        """What is held of each sequence: it survives crashes."""
        return Memory(self._session, self._turn)

    @in_turn
    def decode(self, batch: Batch | object, *, embeddings: bool = False, level: Level = "strict") -> Result:
        """Append a batch to the memory of its sequences.

        Args:
            batch: A `Batch`, or a ctypes ``llama_batch``, which is copied without trusting its pointers.
                Logits are returned for the tokens marked as output.
            embeddings: Also return the hidden states of those tokens.
            level: What is refused before the native call: "strict", all that would fail, crash or be wrong;
                "native", what llama.cpp itself refuses; "off", nothing.

        Raises:
            InputError: The batch does not fit the model, the context or the memory, which is as it was.
            BatchError: The native rung failed and ``safe_fallback`` is off.
            MemoryLostError: After a crash, no new cell could be given the memory.
        """
        columns = self._columns(batch, level)
        held = MemoryState(self._session.pos_min, self._session.pos_max)
        room = capacity(self._native.info, self._native.config, embeddings=embeddings)
        validate(columns, room, held, level)
        return self._ladder.decode(columns, DecodeOptions(embeddings=embeddings))

    @in_turn
    def encode(self, batch: Batch | Columns) -> Result:
        """Hidden states of every token of a batch, from `llama_encode` if the model has an encoder.

        On a decoder-only model `llama_encode` is a SIGSEGV inside llama.cpp (seen in 0.3.16 and 0.3.36);
        preflight knows it and goes straight to the safe rung, which decodes sequence by sequence. The
        memory is neither used nor changed.

        Raises:
            InputError: The batch does not fit the model or the context.
            BatchError: The native rung failed and ``safe_fallback`` is off.
        """
        with self._session.scratch():
            info, config = self._native.info, self._native.config
            columns = batch if isinstance(batch, Columns) else batch.columns()
            columns = dataclasses.replace(columns, outputs=np.ones(len(columns), np.bool_))
            room = capacity(info, config, embeddings=True)
            validate(columns, room, MemoryState.empty(config.n_seq_max), encode=info.has_encoder)
            return self._ladder.encode(columns, DecodeOptions(logits=False, embeddings=True, encode=True))

    @in_turn
    def embed(
        self, texts: Iterable[str], *, pooling: str | None = None, normalize: bool = True
    ) -> Embeddings:
        """A vector for each text, many whole texts per native call, in a cell of its own without adapters.

        Args:
            texts: Each of one token at least, with those that the model adds.
            pooling: "mean", "cls" or "last"; None: the model's own, or "mean" if it has none.
            normalize: Give vectors of length 1.

        Raises:
            InputError: A text is no text, empty or too long, or the model cannot pool like this.
            ModelError: No cell can be had.
        """
        if self._embedder is None:
            cells = self._cells
            self._embedder = Embedder(
                self._native.config,
                cells.limits,
                cells.reporter,
                zygote=cells.zygote,
                spares=cells.spares,
            )
            self._turn.check_open()  # or nobody would close this one
        return self._embedder.embed(texts, pooling=pooling, normalize=normalize)

    @in_turn
    def resize(self, *, n_ctx: int | None = None, n_seq_max: int | None = None) -> None:
        """Change the context without loading the model again. What the memory holds goes over.

        Args:
            n_ctx: Tokens of context over all sequences; None: as it is.
            n_seq_max: Most sequences; None: as it is.

        Raises:
            InputError: A value is out of range, or too small for what the memory holds.
            ModelError: No such context can be made.
        """
        config = self._native.config
        given = {"n_ctx": n_ctx, "n_seq_max": n_seq_max}
        sizes = {name: size for name, size in given.items() if size is not None}
        changed = configure(config.model, **config.parameters() | sizes)
        self._session.resize(changed.n_ctx, changed.n_seq_max)
        self._pools.change(config=self._native.config)
        embedder, self._embedder = self._embedder, None
        if embedder:
            embedder.close()

    @in_turn
    def set_adapters(
        self,
        lora: Mapping[str | Path, float] | None = None,
        control: npt.ArrayLike | None = None,
        layers: tuple[int, int] = (1, -1),
    ) -> None:
        """Use LoRA adapters and a control vector from now on, in the place of those before.

        Args:
            lora: Paths of the adapters, with their scales.
            control: float32, n_embd values for each layer from 1 on; None for no control vector.
            layers: The first and the last layer that it is added to; -1 is the last there is.

        Raises:
            InputError: A file is no adapter of this model, or a value is out of range. Nothing is changed.
        """
        self._session.adapt(Adapters.checked(lora or {}, control, layers, self._native.info.n_embd))
        self._pools.change(adapters=self._session.adapters)

    def submit(self, batch: Batch | object, *, embeddings: bool = False) -> Future[Result]:
        """Decode a batch from empty memory in the next free worker; the decoder's own memory is not used.

        Args:
            batch: As for `decode`.
            embeddings: Also return the hidden states of the outputs.

        Returns:
            A future of the result (``asyncio.wrap_future`` makes it awaitable). It can be cancelled.

        Raises:
            InputError: The batch does not fit the model or the context.
            QueueFullError: Too many jobs wait already.
        """
        nothing = MemoryState.empty(self.n_seq_max)
        columns = self._copied(batch, nothing.next_positions, "strict")
        validate(columns, capacity(self.info, self._native.config, embeddings=embeddings), nothing)
        job = BatchJob(columns, DecodeOptions(embeddings=embeddings))
        self._pools.put([job])
        return job.future

    def flush_reports(self) -> None:
        """Wait until the reports of all crashes and kills that were noticed so far are on disk."""
        with self._turn.passing():
            self._reporter.flush(kept=True)

    def close(self) -> None:
        """End the cells and finish the reports. Idempotent.

        It waits for a call of another thread. A call of this thread, from which a signal handler or a
        callback closes, ends with a `UsageError`. On a thread of the decoder, such as a callback of a future
        is called on, it does not wait. If it is interrupted, it goes on by itself: close again to wait.
        """
        self._turn.close(self._release)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _release(self) -> None:
        pools = self._pools.close()  # there are no more then
        with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
            stack.callback(self._cells.close)  # it reaps those that are being examined
            stack.callback(self._reporter.close)
            stack.callback(self._native.close)
            if self._embedder:
                stack.callback(self._embedder.close)
            if self._texts:
                stack.callback(self._texts.close)
            for pool in pools:
                stack.callback(pool.close)
            if self._turn.broken:  # what it has started or is starting first, for its thread waits
                stack.callback(self._native.close)
                stack.callback(self._cells.stop)

    def _columns(self, batch: object, level: Level) -> Columns:
        return self._copied(batch, self._session.pos_max + 1, level)

    def _copied(self, batch: object, follows: Int32, level: Level) -> Columns:
        """A batch as it is now, whatever the caller does with it later."""
        if isinstance(batch, Columns):
            return batch
        if isinstance(batch, Batch):
            return batch.columns(follows)
        return read_llama_batch(batch, n_embd=self.info.n_embd_inp, next_positions=follows, level=level)


def _known(*owners: Zygote | DecodeClient | Embedder | None) -> list[int]:
    return [owner.pid for owner in owners if owner and owner.pid is not None]
