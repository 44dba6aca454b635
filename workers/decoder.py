"""`Decoder`: the front of the package. Batches and prompts go in, results come out, crashes do not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from crumplezone.errors import CellDied, InputError, UsageError, check_integer
from crumplezone.reports.store import default_directory
from crumplezone.workers.batch import Batch
from crumplezone.workers.calls import Adapters, Ask, Limits
from crumplezone.workers.columns import Columns
from crumplezone.workers.foreign import read_llama_batch
from crumplezone.workers.generation import Generation
from crumplezone.workers.incident import Reporter
from crumplezone.workers.ladder import Ladder
from crumplezone.workers.memory import Memory
from crumplezone.workers.protocol import CellInfo
from crumplezone.workers.results import Completion, Result, Sampling
from crumplezone.workers.runner import Runner
from crumplezone.workers.safe import Descent
from crumplezone.workers.session import Session
from crumplezone.workers.settings import INT32_MAX, N_UBATCH, capacity, check_number, configure
from crumplezone.workers.validate import Level, validate
from crumplezone.workers.validate import Memory as Held


class Decoder:
    """Native batch decoding in a supervised cell, with a safe fallback and crash reports.

    Calls are serialised: several threads may use one decoder. Close it, or use it as a context manager.

    Args:
        model: Path of a GGUF file.
        n_ctx: Tokens of context over all sequences; 0 for 1024 per sequence. Divided evenly.
        n_batch: Most tokens per native call, at least ``n_seq_max``.
        n_ubatch: Most tokens per compute pass.
        n_seq_max: Most sequences per batch, up to 256.
        n_threads: Threads of a cell; 0 for one per available core.
        n_gpu_layers: Layers to offload.
        safe_fallback: Whether a job that the native rung cannot do goes down the ladder.
        preflight: Whether to skip native calls that are known to crash.
        deadline: Seconds until a native call counts as hung, or None.
        memory_limit: Bytes of resident memory above which a cell is killed, or None.
        reports: The report store; None for ``$CRUMPLEZONE_REPORTS`` or the XDG state directory.
        redact: Keep token ids, prompt text and paths out of the reports (hashes and base names instead).
        checkpoint_every: After so many tokens, keep the state of the memory instead of its tokens, so that a
            new cell is given it faster; 0: never.

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
        n_seq_max: int = 4,
        n_threads: int = 0,
        n_gpu_layers: int = 0,
        safe_fallback: bool = True,
        preflight: bool = True,
        deadline: float | None = 300.0,
        memory_limit: int | None = None,
        reports: str | Path | None = None,
        redact: bool = False,
        checkpoint_every: int = 0,
    ) -> None:
        check_integer("checkpoint_every", checkpoint_every, 0, INT32_MAX)
        config = configure(
            model,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
        )
        limits = Limits(deadline, memory_limit)
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._busy_thread = 0
        self._closed = False
        self._running: Generator[Completion, None, None] | None = None
        self._reporter = Reporter(Path(reports) if reports else default_directory(), redacted=redact)
        self._native = Runner(config, limits, self._reporter)
        self._session = Session(self._native, self._reporter, checkpoint_every)
        self._descent = Descent(self._native, self._reporter) if safe_fallback else None
        self._ladder = Ladder(self._session, self._descent, self._reporter, preflight=preflight)
        self._native.start()

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
        """Process id of the native cell, or None while there is none."""
        return self._native.pid

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a text, int32, shape (n,), with the model's special tokens.

        Raises:
            CellDied: The tokenizer crashed.
            ModelError: The cell had died and the model cannot be loaded again.
        """
        if not isinstance(text, str):
            raise InputError("text", text, "must be a str")
        with self._turn():
            try:
                return self._native.tokenize(text)
            except CellDied as died:
                config, info = self._native.config, self._native.info
                self._reporter.file_lone(died.incident, "tokenize", "the tokenizer failed", config, info)
                raise

    @property
    def memory(self) -> Memory:
        """What is held of each sequence: it survives crashes."""
        return Memory(self._session, self._turn)

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
        with self._turn():
            columns = self._columns(batch, level)
            held = Held(self._session.pos_min, self._session.pos_max)
            room = capacity(self._native.info, self._native.config, embeddings=embeddings)
            validate(columns, room, held, level)
            return self._ladder.decode(columns, Ask(embeddings=embeddings))

    def encode(self, batch: Batch | Columns) -> Result:
        """Hidden states of every token of a batch, from `llama_encode` if the model has an encoder.

        On a decoder-only model `llama_encode` is a SIGSEGV inside llama.cpp (seen in 0.3.16 and 0.3.36);
        preflight knows it and goes straight to the safe rung, which decodes sequence by sequence. The
        memory is neither used nor changed.

        Raises:
            InputError: The batch does not fit the model or the context.
            BatchError: The native rung failed and ``safe_fallback`` is off.
        """
        with self._turn(), self._session.scratch():
            info, config = self._native.info, self._native.config
            columns = batch if isinstance(batch, Columns) else batch.columns()
            columns = dataclasses.replace(columns, outputs=np.ones(len(columns), np.bool_))
            room = capacity(info, config, embeddings=True)
            validate(columns, room, Held.empty(config.n_seq_max), encode=info.has_encoder)
            return self._ladder.encode(columns, Ask(logits=False, embeddings=True, encode=True))

    def resize(self, *, n_ctx: int | None = None, n_seq_max: int | None = None) -> None:
        """Change the context without loading the model again. What the memory holds goes over.

        Args:
            n_ctx: Tokens of context over all sequences; None: as it is.
            n_seq_max: Most sequences; None: as it is.

        Raises:
            InputError: A value is out of range, or too small for what the memory holds.
            ModelError: No such context can be made.
        """
        with self._turn():
            config = self._native.config
            fields = {name: getattr(config, name) for name in config.__struct_fields__}
            sizes = {"n_ctx": n_ctx, "n_seq_max": n_seq_max}
            changed = configure(**fields | {name: size for name, size in sizes.items() if size is not None})
            self._session.resize(changed.n_ctx, changed.n_seq_max)

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
        with self._turn():
            self._session.adapt(Adapters.checked(lora or {}, control, layers, self._native.info.n_embd))

    def generate(
        self,
        prompts: Iterable[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        ordered: bool = True,
    ) -> Iterator[Completion]:
        """Complete prompts, ``n_seq_max`` at a time; a place that falls free is taken by the next prompt.

        Args:
            prompts: Texts, none of them empty.
            max_tokens: Most tokens to add to each.
            temperature: 0 is greedy.
            seed: For temperatures above 0: the same seed gives the same text, crash or no crash.
            ordered: Yield in the order of the prompts, else as they finish.

        Yields:
            One `Completion` per prompt. What fails alone has its ``error`` set.

        Raises:
            InputError: A prompt is no text or empty, or a parameter is out of range.
        """
        if isinstance(prompts, str | bytes):
            raise InputError("prompts", prompts, "must be a list of texts, not one text")
        finished = self.complete(dict(enumerate(prompts)), Sampling(max_tokens, temperature, seed))
        return _in_order(finished) if ordered else finished

    def complete(self, prompts: Mapping[int, str], sampling: Sampling) -> Generator[Completion, None, None]:
        """`generate` for prompts that keep numbers of their own; yields as they finish.

        Raises:
            InputError: A prompt is no text or empty, or a parameter is out of range.
        """
        check_integer("max_tokens", sampling.max_tokens, 1, INT32_MAX)
        check_number("temperature", sampling.temperature, 0, 100)
        check_integer("seed", sampling.seed, 0, 2**63 - 1)
        for index, prompt in prompts.items():
            if not isinstance(prompt, str) or not prompt:
                raise InputError(f"prompts[{index}]", prompt, "must be a text of at least one character")
        return self._completions(prompts, sampling)

    def _completions(
        self, prompts: Mapping[int, str], sampling: Sampling
    ) -> Generator[Completion, None, None]:
        with self._turn(), self._session.scratch():
            generation = Generation(self._native, self._descent, self._reporter, sampling)
            self._running = generation.run(list(prompts.items()))
            try:
                yield from self._running
            finally:
                self._running = None

    def flush_reports(self) -> None:
        """Wait until the reports of all crashes so far are on disk."""
        self._reporter.flush()

    def close(self) -> None:
        """End the cells and finish the reports. Waits for a call of another thread. Idempotent."""
        if os.getpid() != self._owner:
            return
        with self._changed:
            mine = self._busy_thread == threading.get_ident()  # a generate() of this thread, suspended
            self._changed.wait_for(lambda: mine or self._closed or not self._busy_thread)
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()  # whoever waits for a turn is told that there will be none
        if self._running is not None:
            self._running.close()  # it still has reports to file
        self._native.shut()
        self._reporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if os.getpid() != self._owner:
            raise UsageError("this decoder was made before a fork: make a new one in this process")
        me = threading.get_ident()
        with self._changed:
            if self._busy_thread == me:
                raise UsageError(
                    "a generate() of this thread is still running: finish it or close() it first"
                )
            self._changed.wait_for(lambda: self._closed or not self._busy_thread)
            if self._closed:
                raise UsageError("this decoder is closed: make a new one")
            self._busy_thread = me
        try:
            yield
        finally:
            with self._changed:
                self._busy_thread = 0
                self._changed.notify_all()

    def _columns(self, batch: object, level: Level) -> Columns:
        follows = self._session.pos_max + 1
        if isinstance(batch, Columns):
            return batch
        if isinstance(batch, Batch):
            return batch.columns(follows)
        return read_llama_batch(
            batch, n_embd=self._native.info.n_embd_inp, next_positions=follows, level=level
        )


def _in_order(finished: Iterator[Completion]) -> Iterator[Completion]:
    waiting: dict[int, Completion] = {}
    due = 0
    for completion in finished:
        waiting[completion.index] = completion
        while due in waiting:
            yield waiting.pop(due)
            due += 1
