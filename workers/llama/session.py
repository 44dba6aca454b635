"""Supervisor side of `Llama`: a cell, replaced when it has died, and the calls that go on in the next."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from crumplezone.errors import (
    CellDied,
    CellRefused,
    CrumplezoneError,
    InputError,
    ModelError,
    SequenceError,
    UsageError,
)
from crumplezone.reports.formats import text
from crumplezone.reports.records.report import Evidence, Exit, Outcome, Report
from crumplezone.sandbox.cells.cell import Cell, CellSpec
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.llama.call_lock import CallLock
from crumplezone.workers.llama.task import LlamaSnapshot, Task
from crumplezone.workers.model.file import check_file
from crumplezone.workers.model.limits import Limits
from crumplezone.workers.protocol.config import CACHE_TYPES, CellConfig
from crumplezone.workers.protocol.llama import (
    STATE_MAX,
    VALUE_MAX,
    Fetch,
    Invoke,
    Judge,
    Judged,
    LlamaConfig,
    LlamaInfo,
    Next,
    Note,
    Nothing,
    Output,
    Query,
    Question,
    question_shapes,
)

TARGET = "crumplezone.workers.native.llama_cell:LlamaCell"
_T = TypeVar("_T")
Decode = Callable[[bytes], Any]
_BULK = {"scores_bytes", "state_bytes"}  # arrays and states, as large as the context makes them
_END = object()  # of an iterator
_CACHE_TYPES = {number: name for name, number in CACHE_TYPES.items()}
_SAME = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError)
_RAISED = {kind.__name__: kind for kind in (*_SAME, TypeError, ValueError, ZeroDivisionError)}


class LoadFailedError(ModelError, ValueError):
    """The model could not be loaded. The original raises a ValueError."""


def check_model(path: Path) -> None:
    """Refuse what is certainly no model.

    Raises:
        LoadFailedError: Missing, unreadable, or not GGUF.
    """
    try:
        check_file(path)
    except ModelError as error:
        missing = "" if path.exists() else f"Model path does not exist: {path}; "  # the original's words
        raise LoadFailedError(str(path), missing + str(error).partition(": ")[2]) from error


class Session:
    """The cell of a `Llama` and what it holds.

    Args:
        config: Of the cell.
        limits: Of every call and cell.
        reporter: Where crashes go.
        target: What the cell runs.
    """

    def __init__(self, config: LlamaConfig, limits: Limits, reporter: Reporter, target: str = TARGET) -> None:
        self._config, self._limits, self._reporter, self._target = config, limits, reporter, target
        self.standing = LlamaSnapshot(seed=config.parameters["seed"] or 0xFFFFFFFF)
        self._owner = os.getpid()
        self._closed = False
        self._turn = CallLock()
        self._busy = threading.RLock()  # for one exchange; a callback's own queries come from the same thread
        self._asking = False
        self._cell: Cell | None = None
        self._careful = False  # the running cell is a cautious one
        self._synced = False  # it holds the tokens of `standing`
        self._current: Task | None = None  # its iterator is in the cell
        self.info: LlamaInfo | None = None
        self.info = self._start(cautious=False).info(LlamaInfo)
        self.standing.chat_format = self.info.chat_format

    @property
    def pid(self) -> int | None:
        """Process id of the running cell, if there is one."""
        return self._cell.pid if self._cell and self._cell.alive else None

    def call(self, task: Task, kind: Decode) -> Any:
        """Run a task to its end.

        Args:
            task: That is no iterator.
            kind: Decodes its value.
        """
        self._check()
        with self._turn.of(task), self._busy:
            return self._attempt(task, lambda: task.told(self._decode(kind, self._invoke(task))))

    def query(self, task: Task, kind: Decode) -> Any:
        """Run a task that changes nothing, even while another is suspended or asks."""
        self._check(query=True)
        with self._busy:
            if self._asking:  # its death is the asking task's, which goes on in the next cell
                return self._decode(kind, self._send(Query, task))
            return self._attempt(task, lambda: self._decode(kind, self._send(Query, task)))

    def open(self, task: Task) -> None:
        """Make the iterator of a task now, for the errors that its making has."""
        self._check()
        with self._turn.of(task), self._busy:
            self._attempt(task, lambda: self._invoke(task))

    def stream(self, task: Task, kind: Decode) -> Generator[Any, list[int] | None, None]:
        """The items of a task that is an iterator."""
        sent: list[int] | None = None
        try:
            while True:
                self._check()
                self._turn.take(task)
                with self._busy:
                    item = self._attempt(task, functools.partial(self._pull, task, sent, kind))
                if item is _END:
                    return
                sent = yield item
        finally:
            self._turn.release(task)

    def close(self) -> None:
        """End the cell and finish the reports. Waits for an exchange of another thread. Idempotent."""
        if os.getpid() != self._owner:
            return
        with self._busy:
            if not self._closed:
                self._closed = True
                self._turn.close()
                if self._cell is not None:
                    self._cell.close()
                self._reporter.close()

    def flush_reports(self) -> None:
        """Wait until the reports of all crashes so far are on disk."""
        self._reporter.flush()

    def _check(self, *, query: bool = False) -> None:
        if os.getpid() != self._owner:
            raise UsageError("this Llama was made before a fork: make a new one in this process")
        if self._closed:
            raise UsageError("this Llama is closed: make a new one")
        if self._asking and not query and self._turn.mine():
            raise UsageError("a logits processor or stopping criterion may only tokenize and detokenize")

    # One exchange with the cell.

    def _start(self, *, cautious: bool) -> Cell:
        if self._closed:  # while this thread waited for its turn
            raise UsageError("this Llama is closed: make a new one")
        if self._cell is not None and self._cell.alive and self._careful == cautious:
            return self._cell
        if self._cell is not None:
            self._cell.close()
        self._synced, self._current, self._careful = False, None, cautious
        check_model(Path(self._config.path))  # it may be gone since the last cell
        config = careful(self._config) if cautious else self._config
        self._cell = self._spawn(CellSpec(self._target, config, memory_limit=self._limits.memory))
        info = self.info or self._cell.info(LlamaInfo)
        self._cell.arena.reserve(question_shapes(info.cell.n_vocab, info.n_ctx))
        return self._cell

    def _spawn(self, spec: CellSpec) -> Cell:
        path = self._config.path
        try:
            return Cell(spec)
        except CellRefused as error:
            if error.kind == "LoadError":
                raise LoadFailedError(path, f"llama.cpp cannot load it: {error}") from error
            raise _RAISED.get(error.kind, CrumplezoneError)(str(error)) from error
        except OSError as error:
            remedy = "free memory, processes or file descriptors"
            raise CrumplezoneError(f"no cell could be started ({error}): {remedy}") from error
        except CellDied as died:
            result = "the model could not be loaded"
            report = self._reporter.file_lone(
                died.incident, "while loading the model", result, self._context(), None
            )
            self._reporter.flush()
            evidence: Evidence = died.incident.evidence.result()
            what = text.summary(Report("", "", evidence, result=result))
            problem = f"llama.cpp died while loading it. {what} Report: {report}"
            raise LoadFailedError(path, problem, report) from died

    def _send(self, kind: type[Invoke | Query], task: Task, *, known: bool = True) -> bytes:
        cell = self._start(cautious=task.cautious if kind is Invoke else self._careful)
        raw = msgspec.msgpack.encode(task.job(known=known and self._synced))
        cell.arena.arrays([("u1", len(raw))])[0][:] = np.frombuffer(raw, np.uint8)
        if kind is Query:
            return self._value(cell, cell.call(Query(len(raw)), Output, self._limits.deadline), task)
        self._synced, self._current = False, task
        return self._exchange(Invoke(len(raw)), task)[0]

    def _invoke(self, task: Task) -> bytes:
        """Begin a task; again, if another cell has had it or another task has ended it."""
        again, task.begun = task.begun, True
        if not again:
            task.base = replace(self.standing, tokens=list(self.standing.tokens))
        task.tokens = list(task.base.tokens)
        return self._send(Invoke, task, known=not again)

    def _pull(self, task: Task, sent: list[int] | None, kind: Decode) -> Any:
        if self._current is not task or self._cell is None or not self._cell.alive:
            self._invoke(task)
            for earlier in task.sent:  # the caller has had these items
                self._exchange(Next(earlier), task)
        value, end = self._exchange(Next(sent), task)
        if end:
            return _END
        task.sent.append(sent)
        return task.told(self._decode(kind, value))

    def _exchange(self, request: Invoke | Next, task: Task) -> tuple[bytes, bool]:
        cell, info = self._cell, self.info
        assert cell is not None
        assert info is not None
        on_ask = functools.partial(self._answer, cell, task)
        output = cell.call(request, Output, self._limits.deadline, on_ask)
        value = self._value(cell, output, task)
        problem = task.take(output.note, info.cell.n_vocab)
        if problem or output.n_tokens > len(task.tokens):
            raise cell.condemn(Exit.PROTOCOL, f"the cell {problem or 'holds more tokens than it told of'}")
        del task.tokens[output.n_tokens :]
        self.standing.tokens, self.standing.seed = list(task.tokens), output.seed
        self._synced = True
        return value, output.end

    def _decode(self, kind: Decode, raw: bytes) -> Any:
        try:
            return kind(raw)
        except (msgspec.MsgspecError, RecursionError) as error:
            assert self._cell is not None
            raise self._cell.condemn(Exit.PROTOCOL, f"the cell sent what is no result: {error}") from error

    def _value(self, cell: Cell, output: Output, task: Task) -> bytes:
        if not output.size:
            return output.value
        most = STATE_MAX if task.method in _BULK else VALUE_MAX
        if output.size > most:
            raise cell.condemn(Exit.PROTOCOL, f"the cell has a value of {output.size} bytes, at most {most}")
        cell.arena.reserve([("u1", output.size)])
        cell.call(Fetch(), Nothing, self._limits.deadline)
        raw: bytes = cell.arena.arrays([("u1", output.size)])[0].tobytes()
        return raw

    def _answer(self, cell: Cell, task: Task, body: msgspec.Raw) -> msgspec.Struct:
        """Answer a question of the cell; what the caller's callbacks raise goes through."""
        info = self.info
        assert info is not None
        try:
            question = msgspec.msgpack.decode(body, type=Question)
        except msgspec.MsgspecError as error:
            raise cell.condemn(Exit.PROTOCOL, f"the cell asked what does not decode: {error}") from error
        note = question if isinstance(question, Note) else question.note
        if problem := task.take(note, info.cell.n_vocab):
            raise cell.condemn(Exit.PROTOCOL, f"the cell {problem}")
        if isinstance(question, Note):
            return Nothing()
        if question.n_ids > info.n_ctx:
            raise cell.condemn(Exit.PROTOCOL, f"the cell asked about {question.n_ids} tokens")
        shapes = question_shapes(info.cell.n_vocab, question.n_ids)
        logits, ids = (array.copy() for array in cell.arena.arrays(shapes))
        self._asking = True
        try:
            if isinstance(question, Judge):
                assert task.criteria is not None
                return Judged(bool(task.criteria(ids, logits)))
            for processor in task.processors or ():
                logits[:] = processor(ids, logits)
        finally:
            self._asking = False
        cell.arena.arrays(shapes)[0][:] = logits  # a query may have used the arena meanwhile
        return Judged()

    # Crashes.

    def _attempt(self, task: Task, step: Callable[[], _T]) -> _T:
        """A step of a task, in as many cells as it takes."""
        while True:
            try:
                value = step()
            except CellDied as died:
                if self._cell is not None and self._cell.alive:  # of something else, in a callback
                    raise
                self._lost(task, died)
            except CellRefused as refused:
                self._forget()
                if "llama_decode returned" in str(refused) and self._cell is not None:
                    self._cell.close()  # its context is not to be trusted
                self._settle(task, f"{task.method} failed: {refused}")
                raise self._translated(task, refused) from refused
            except BaseException as error:
                self._forget()
                self._settle(task, f"{task.method} was given up: {type(error).__name__}")
                raise
            else:
                self._settle(task, f"{task.method} went on in a new cell; nothing was lost", cured=True)
                return value

    def _forget(self) -> None:
        self._synced, self._current = False, None

    def _lost(self, task: Task, died: CellDied) -> None:
        """Report a crash, and decide whether there is another attempt."""
        self._forget()
        again = task.lost()
        context = self._context()
        crashed = task.case
        rung = "token" if self._careful else "native"
        known = self.info.cell if self.info else None
        path = self._reporter.add(crashed, died.incident, rung, task.batch(context.n_batch), context, known)
        task.reports.append(path)
        crashed.step(rung, Outcome.CRASHED, [0], f"{task.method}: {died}")
        if task.stage == "grammar":
            self._settle(task, "the grammar crashes llama.cpp's parser")
            shown = task.grammar.text if task.grammar else task.args.get("response_format")
            raise InputError(
                "grammar", shown, f"crashes llama.cpp's grammar parser; report: {path}"
            ) from died
        if not again:
            crashed.blamed.append(0)
            self._settle(task, f"{task.method} crashes token by token too")
            self._reporter.flush()  # an error that names a report comes after it
            problem = f"{task.method} lost {task.losses} cells, the last one with one thread, token by token"
            raise SequenceError(0, f"{problem}: {died}", path) from died

    def _settle(self, task: Task, result: str, *, cured: bool = False) -> None:
        if task.case.crashes:
            if cured:
                task.case.step(task.rung, Outcome.OK, [0], "again, in a new cell")
            task.case.result = result
            self._reporter.file(task.case, self._context(), self.info.cell if self.info else None)
            task.case = JobRecord()

    def _translated(self, task: Task, refused: CellRefused) -> Exception:
        """What the original raises, as far as it is a built-in exception."""
        message = str(refused)
        if refused.kind == "GrammarError":
            shown = task.grammar.text if task.grammar else task.args.get("response_format")
            return InputError("grammar", shown, message)
        if refused.kind == "LlamaChatCompletionHandlerNotFoundException":
            return InputError("chat_format", task.base.chat_format, message)
        if refused.kind.startswith("Unicode"):
            return ValueError(message)
        kind = _RAISED.get(refused.kind)
        return kind(message) if kind else refused

    def _context(self) -> CellConfig:
        """Of the running cell, as reports have it."""
        config = careful(self._config) if self._careful else self._config
        given, info = config.parameters, self.info
        return CellConfig(
            model=config.path,
            n_ctx=info.n_ctx if info else given["n_ctx"],
            n_batch=given["n_batch"],
            n_ubatch=min(given["n_ubatch"], given["n_batch"]),
            n_seq_max=info.n_seq_max if info else 1,
            n_threads=given["n_threads"],
            n_gpu_layers=given["n_gpu_layers"],
            type_k=_CACHE_TYPES.get(given["type_k"], "f16"),
            type_v=_CACHE_TYPES.get(given["type_v"], "f16"),
            flash_attn="on" if given["flash_attn"] else "off",
        )


def careful(config: LlamaConfig) -> LlamaConfig:
    """One thread, token by token. Embeddings need their text in one batch, and a draft its tokens."""
    changed: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}
    if not config.parameters["embedding"]:
        changed |= {"n_batch": 1, "n_ubatch": 1}
    if config.lookup:
        changed["logits_all"] = True  # as the original has it with a draft model
    return LlamaConfig(config.path, config.parameters | changed)


def decoded(kind: Any) -> Decode:
    """A decoder of values of a cell, checked against a type."""
    return msgspec.msgpack.Decoder(kind).decode
