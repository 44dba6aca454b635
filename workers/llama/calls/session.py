"""Supervisor side of `Llama`: its calls, each in as many cells as it takes."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from crumplezone.errors import CellDied, CellRefused, InputError, SequenceError, UsageError
from crumplezone.reports.records.report import BatchRecord
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.cells.factory import Cells
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.llama.calls.callbacks import Callbacks
from crumplezone.workers.llama.calls.checkpoint import Checkpoint
from crumplezone.workers.llama.calls.client import Decode, LlamaClient
from crumplezone.workers.llama.calls.lock import CallLock
from crumplezone.workers.llama.calls.task import LlamaSnapshot, Task
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.llama import LlamaConfig, LlamaInfo, LlamaSeedInfo, Output

_T = TypeVar("_T")
_END = object()  # of an iterator
_SAME = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError)
_RAISED = {kind.__name__: kind for kind in (*_SAME, TypeError, ValueError, ZeroDivisionError)}
_SPARE_MAX = 2**29  # bytes of a context: a larger one is made a second time only for who asks for it

_log = logging.getLogger("crumplezone")


class Session:
    """What a `Llama` is on this side: its cells, and where its calls stand.

    Args:
        config: Of its cells.
        cells: Where they come from, and what holds for all of them.
        spares: As the caller gave it; None: one, unless it were dear.

    Raises:
        ModelError, CrumplezoneError: No cell can be had for the model.
    """

    def __init__(self, config: LlamaConfig, cells: Cells, spares: int | None) -> None:
        self._llama, self._cells, self.reporter = config, cells, cells.reporter
        self.snapshot = LlamaSnapshot(seed=config.parameters["seed"] or 0xFFFFFFFF)
        self._owner = os.getpid()
        self._closed = False
        self._lock = CallLock()
        self._busy = threading.RLock()  # for one exchange; a callback's own queries come from the same thread
        self._callbacks = Callbacks()
        self._checkpoint = Checkpoint(cells.limits.memory)
        self._cautious = self._native = self._client = self._made(config.careful(), 0, Rung.TOKEN)
        try:
            self._native = self._client = self._made(config, self._spares(spares), Rung.NATIVE)
            self._native.start()
        except BaseException:
            self.close()
            raise
        self.snapshot.chat_format = self.info.chat_format

    def _made(self, config: LlamaConfig, spares: int, rung: Rung) -> LlamaClient:
        source = self._cells.source("llama", config, spares=spares, owner="Llama", refusals=_RAISED)
        return LlamaClient(source, config, self._cells.limits.deadline, rung)

    def _spares(self, given: int | None) -> int:
        if given is not None or not self._cells.zygote:
            return self._cells.spares
        if self._llama.parameters["logits_all"]:
            why = "logits_all keeps a row of logits for each token of the context"
        else:
            seed = self._cautious.seed_info(LlamaSeedInfo)
            if seed and seed.context_bytes < _SPARE_MAX:
                return self._cells.spares
            size = f"its context would take another {seed.context_bytes >> 20} MiB" if seed else ""
            why = size or "this llama.cpp cannot be forked, so each cell loads the model"
        _log.info("no spare cell is kept for this Llama: %s. Llama(..., spares=1) keeps one", why)
        return 0

    @property
    def info(self) -> LlamaInfo:
        """What the model and the context are."""
        assert self._native.known is not None
        return self._native.known

    @property
    def config(self) -> CellConfig:
        """Of the running cell, as reports have it."""
        return self._client.context

    @property
    def known(self) -> CellInfo | None:
        """Facts of the model, if a cell ever ran."""
        return self._client.model

    @property
    def alive(self) -> bool:
        """Whether the cell of the latest call was not lost."""
        return self._client.cell is not None and self._client.cell.alive

    @property
    def processes(self) -> dict[str, list[int]]:
        """Process ids: of the "zygote", the "cell" and the "spares"."""
        zygote = self._cells.zygote
        known = {"zygote": zygote.pid if zygote else None, "cell": self._client.pid}
        found = {name: [pid] if pid else [] for name, pid in known.items()}
        return found | {"spares": self._native.spare_pids}

    def wait_for_spares(self, timeout: float) -> bool:
        """Wait until every spare is there; False if that takes longer (seconds), or none is made any more."""
        return self._native.wait_for_spares(timeout)

    def call(self, task: Task, kind: Decode) -> Any:
        """Run a task to its end.

        Args:
            task: That is no iterator.
            kind: Decodes its value.
        """
        self._check()
        with self._lock.of(task), self._busy:
            return self._attempt(task, lambda: self._called(task, kind))

    def query(self, task: Task, kind: Decode) -> Any:
        """Run a task that changes nothing, even while another is suspended or asks."""
        self._check(query=True)
        with self._busy:
            if self._callbacks.running:  # its death is the asking task's, which goes on in the next cell
                return self._queried(task, kind)
            self._client.start()
            return self._attempt(task, lambda: self._queried(task, kind))

    def open(self, task: Task) -> None:
        """Make the iterator of a task now, for the errors that its making has."""
        self._check()
        with self._lock.of(task), self._busy:
            self._attempt(task, lambda: self._invoke(task))

    def stream(self, task: Task, kind: Decode) -> Generator[Any, list[int] | None, None]:
        """The items of a task that is an iterator."""
        sent: list[int] | None = None
        try:
            while True:
                self._check()
                self._lock.take(task)
                with self._busy:
                    item = self._attempt(task, functools.partial(self._pull, task, sent, kind))
                if item is _END:
                    return
                sent = yield item
        finally:
            self._lock.release(task)

    def close(self) -> None:
        """End the cells and finish the reports. Waits for an exchange of another thread. Idempotent."""
        if os.getpid() != self._owner:
            return
        with self._busy:
            if not self._closed:
                self._closed = True
                self._lock.close()
                self._cells.stop()  # before its cells are reaped, which it might not answer
                self._native.close()
                self._cautious.close()
                self.reporter.close()
                self._cells.close()  # last: it reaps those that are being examined

    def flush_reports(self) -> None:
        """Wait until the reports of all crashes so far are on disk."""
        self.reporter.flush()

    def _check(self, *, query: bool = False) -> None:
        if os.getpid() != self._owner:
            raise UsageError("this Llama was made before a fork: make a new one in this process")
        if self._closed:
            raise UsageError("this Llama is closed: make a new one")
        if self._callbacks.running and not query and self._lock.mine():
            raise UsageError("a logits processor or stopping criterion may only tokenize and detokenize")

    # One exchange with the cell.

    def _called(self, task: Task, kind: Decode) -> Any:
        raw = self._invoke(task)
        task.restored = False
        return task.told(self._client.decode(kind, raw))

    def _queried(self, task: Task, kind: Decode) -> Any:
        client = self._client
        output = client.query(task.call(known=client.synced))
        return client.decode(kind, client.value(output, task.method))

    def _invoke(self, task: Task) -> bytes:
        """Begin a task; again, if another cell has had it or another task has ended it."""
        client, again = self._chosen(task), task.begun
        if again:
            client.running()
        else:
            client.start()
            task.begun, task.base = True, replace(self.snapshot, tokens=list(self.snapshot.tokens))
        reached, task.tokens = task.tokens, list(task.base.tokens)
        known = client.synced and not again
        saved: list[int] = []
        if not known and self._checkpoint.serves(reached or task.tokens):
            task.restored = True  # until it got further: a death on the way may be that of the state
            saved = self._checkpoint.give(client)
        client.synced, client.current = False, task
        call = task.call(known=known, saved=saved)
        return self._exchanged(task, lambda answer: client.invoke(call, answer))[0]

    def _chosen(self, task: Task) -> LlamaClient:
        client = self._cautious if task.cautious else self._native
        if client is not self._client:  # one context is enough
            self._client.discard_cell()
            self._client = client
        return client

    def _pull(self, task: Task, sent: list[int] | None, kind: Decode) -> Any:
        client = self._client
        if client.current is not task or client.cell is None or not client.cell.alive:
            self._invoke(task)
            for earlier in task.sent:  # the caller has had these items
                self._next(task, earlier)
        elif self._checkpoint.due and self._llama.restorable and not self.info.cell.recurrent:
            self._checkpoint.make(self.snapshot.tokens, client)
        value, end = self._next(task, sent)
        if end:
            return _END
        task.sent.append(sent)
        return task.told(self._client.decode(kind, value))

    def _next(self, task: Task, sent: list[int] | None) -> tuple[bytes, bool]:
        found = self._exchanged(task, lambda answer: self._client.next(sent, answer))
        task.restored = False
        return found

    def _exchanged(self, task: Task, ask: Callable[[Callable[..., Any]], Output]) -> tuple[bytes, bool]:
        """The value of an exchange, and whether it was the last; what it has changed is noted."""
        client = self._client

        def answer(body: msgspec.Raw) -> msgspec.Struct:
            return self._callbacks.answer(client, task, body)

        with self._checkpoint.computing():
            output = ask(answer)
        value = client.value(output, task.method)
        problem = task.take(output.note, self.info.cell.n_vocab)
        if problem or output.n_tokens > len(task.tokens):
            raise client.lie(problem or "holds more tokens than it told of")
        del task.tokens[output.n_tokens :]
        self.snapshot.tokens, self.snapshot.seed = list(task.tokens), output.seed
        client.synced = True
        return value, output.end

    # Crashes.

    def _attempt(self, task: Task, step: Callable[[], _T]) -> _T:
        """A step of a task, in as many cells as it takes."""
        job = JobRecord()
        while True:
            tried = _Trial(self, task, job)
            try:
                with tried:
                    value = step()
            except BaseException as error:
                told = self._given_up(task, job, error)
                if told is error:
                    raise
                raise told from error
            if tried.ok:
                self._settle(job, f"{task.method} went on in a new cell; nothing was lost")
                return value
            self._lost(task, job, tried)

    def _given_up(self, task: Task, job: JobRecord, error: BaseException) -> BaseException:
        """What to raise for an error that costs no cell."""
        self._client.forget()
        if not isinstance(error, CellRefused):
            self._settle(job, f"{task.method} was given up: {type(error).__name__}")
            return error
        if "llama_decode returned" in str(error):
            self._client.discard_cell()  # its context is not to be trusted
        self._settle(job, f"{task.method} failed: {error}")
        return self._translated(task, error)

    def _lost(self, task: Task, job: JobRecord, tried: Attempt) -> None:
        """Decide whether there is another attempt."""
        self._client.forget()
        if task.restored:
            self._checkpoint.drop()
            task.restored = False
        again, path = task.lost(), tried.report
        assert path is not None
        task.reports.append(path)
        if task.stage == "grammar":
            self._settle(job, "the grammar crashes llama.cpp's parser", failed=True)
            problem = f"crashes llama.cpp's grammar parser; report: {path}"
            raise InputError("grammar", task.shown_grammar, problem) from tried.error
        if not again:
            job.blamed.append(0)
            self._settle(job, f"{task.method} crashes token by token too", failed=True)
            problem = f"{task.method} lost {task.losses} cells, the last one with one thread, token by token"
            raise SequenceError(0, f"{problem}: {tried.error}", path) from tried.error

    def _settle(self, job: JobRecord, result: str, *, failed: bool = False) -> None:
        if job.crashes:
            job.result = result
            self.reporter.file(job, self.config, self.known, failed=failed)

    def _translated(self, task: Task, refused: CellRefused) -> Exception:
        """What the original raises, as far as it is a built-in exception."""
        message = str(refused)
        if refused.kind == "GrammarError":
            return InputError("grammar", task.shown_grammar, message)
        if refused.kind == "LlamaChatCompletionHandlerNotFoundException":
            return InputError("chat_format", task.base.chat_format, message)
        if refused.kind.startswith("Unicode"):
            return ValueError(message)
        kind = _RAISED.get(refused.kind)
        return kind(message) if kind else refused


class _Trial(Attempt):
    """One try of a step. What it is told of is the death of the session's own cell."""

    def __init__(self, session: Session, task: Task, job: JobRecord) -> None:
        super().__init__(session.reporter, job, session, task.rung, [0], self._evaluated)
        self._session, self._task = session, task

    def tells(self, error: BaseException) -> bool:
        """Not of another cell, that a callback of the caller has used."""
        return isinstance(error, CellDied) and not self._session.alive

    @property
    def problem(self) -> str:
        """With the method's name."""
        return f"{self._task.method}: {self.error}" if self.error else ""

    def _evaluated(self) -> BatchRecord | None:
        return self._task.batch(self._session.config.n_batch)


def decoded(kind: Any) -> Decode:
    """A decoder of values of a cell, checked against a type."""
    return msgspec.msgpack.Decoder(kind).decode
