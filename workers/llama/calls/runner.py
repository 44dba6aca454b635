"""Supervisor side of `Llama`: runs its calls, each in as many cells as it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from crumplezone.errors import CellDied, CellRefused, InputError, SequenceError
from crumplezone.reports.records.report import BatchRecord
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.deaths import was_killed
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.llama.calls.callbacks import Callbacks
from crumplezone.workers.llama.calls.checkpoint import Checkpoint
from crumplezone.workers.llama.calls.client import Decode, LlamaClient
from crumplezone.workers.llama.calls.task import LlamaSnapshot, Task
from crumplezone.workers.protocol.config import CellConfig, CellInfo
from crumplezone.workers.protocol.llama import Output

_T = TypeVar("_T")
END = object()
"""Of an iterator: what `TaskRunner.pull` returns behind the last item."""

_SAME = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError)
RAISED = {kind.__name__: kind for kind in (*_SAME, TypeError, ValueError, ZeroDivisionError)}
"""The exceptions of a cell that its caller gets as they are, as from the original."""


class TaskRunner:
    """Runs tasks, one exchange at a time. Its user holds a lock meanwhile.

    Args:
        native: Cells as the caller wants them.
        cautious: Cells with one thread, token by token.
        reporter: Where crashes go.
        checkpoint: Of the native cells' memory.
        restorable: Whether a saved state is all that a cell needs to go on.
        seed: Of the first sampler.

    Attributes:
        client: Of the running cell.
        callbacks: That answer its questions.
        snapshot: What the `Llama` is between two calls.
    """

    def __init__(
        self,
        native: LlamaClient,
        cautious: LlamaClient,
        reporter: Reporter,
        checkpoint: Checkpoint,
        *,
        restorable: bool,
        seed: int,
    ) -> None:
        self._native, self._cautious, self.reporter = native, cautious, reporter
        self._checkpoint, self._restorable = checkpoint, restorable
        self.client, self.callbacks, self.snapshot = native, Callbacks(), LlamaSnapshot(seed=seed)

    @property
    def config(self) -> CellConfig:
        """Of the running cell, as reports have it."""
        return self.client.context

    @property
    def known(self) -> CellInfo | None:
        """Facts of the model, if a cell ever ran."""
        return self.client.model

    @property
    def alive(self) -> bool:
        """Whether the cell of the latest call was not lost."""
        return self.client.cell is not None and self.client.cell.alive

    def call(self, task: Task, kind: Decode) -> Any:
        """A task that is no iterator, from begin to end; ``kind`` decodes its value."""
        return self._attempt(task, lambda: self._called(task, kind))

    def query(self, task: Task, kind: Decode, *, asked: bool = False) -> Any:
        """A task that changes nothing; ``asked``: by a callback of another that runs."""
        if asked:  # its death is the asking task's, which goes on in the next cell
            return self._queried(task, kind)
        self.client.start()
        return self._attempt(task, lambda: self._queried(task, kind))

    def open(self, task: Task) -> None:
        """Make the iterator of a task."""
        self._attempt(task, lambda: self._invoke(task))

    def pull(self, task: Task, sent: list[int] | None, kind: Decode) -> Any:
        """The next item of a task's iterator, or `END`."""
        return self._attempt(task, lambda: self._pulled(task, sent, kind))

    # One exchange with the cell.

    def _called(self, task: Task, kind: Decode) -> Any:
        raw = self._invoke(task)
        task.restored = False
        return task.told(self.client.decode(kind, raw))

    def _queried(self, task: Task, kind: Decode) -> Any:
        client = self.client
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
        reached, task.tokens, task.asked = task.tokens, list(task.base.tokens), 0
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
        if client is not self.client:  # one context is enough
            self.client.discard_cell()
            self.client = client
        return client

    def _pulled(self, task: Task, sent: list[int] | None, kind: Decode) -> Any:
        client = self.client
        if client.current is not task or client.cell is None or not client.cell.alive:
            self._invoke(task)
            for earlier in task.sent:  # the caller has had these items
                self._next(task, earlier)
        elif self._checkpoint.due and self._restorable and not client.info.cell.recurrent:
            self._checkpoint.make(self.snapshot.tokens, client)
        value, end = self._next(task, sent)
        if end:
            return END
        task.sent.append(sent)
        return task.told(self.client.decode(kind, value))

    def _next(self, task: Task, sent: list[int] | None) -> tuple[bytes, bool]:
        found = self._exchanged(task, lambda answer: self.client.next(sent, answer))
        task.restored = False
        return found

    def _exchanged(self, task: Task, ask: Callable[[Callable[..., Any]], Output]) -> tuple[bytes, bool]:
        """The value of an exchange, and whether it was the last; what it has changed is noted."""
        client = self.client

        def answer(body: msgspec.Raw) -> msgspec.Struct:
            return self.callbacks.answer(client, task, body)

        with self._checkpoint.computing():
            output = ask(answer)
        value = client.value(output, task.method)
        problem = task.take(output.note, client.info.cell.n_vocab, client.info.n_ctx)
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
        self.client.forget()
        if not isinstance(error, CellRefused):
            self._settle(job, f"{task.method} was given up: {type(error).__name__}")
            return error
        if "llama_decode returned" in str(error):
            self.client.discard_cell()  # its context is not to be trusted
        self._settle(job, f"{task.method} failed: {error}")
        return self._translated(task, error)

    def _lost(self, task: Task, job: JobRecord, tried: Attempt) -> None:
        """Decide whether there is another attempt."""
        self.client.forget()
        if task.restored:
            self._checkpoint.drop()
            task.restored = False
        died, path = tried.died, tried.report
        assert died is not None
        assert path is not None
        again = task.lost(died)
        task.reports.append(path)
        if task.stage == "grammar" and not was_killed(died):
            self._settle(job, "the grammar crashes llama.cpp's parser", failed=True)
            named = self.reporter.written(path)
            problem = "crashes llama.cpp's grammar parser" + (f"; report: {named}" if named else "")
            raise InputError("grammar", task.shown_grammar, problem) from tried.error
        if not again:
            job.blamed.append(0)
            self._settle(job, f"{task.method} was given up", failed=True)
            how = ", the last one with one thread, token by token" if task.cautious else ""
            problem = f"{task.method} lost {task.losses} cells{how}: {tried.error}"
            raise SequenceError(0, problem, self.reporter.written(path)) from died

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
        kind = RAISED.get(refused.kind)
        return kind(message) if kind else refused


class _Trial(Attempt):
    """One try of a step. What it is told of is the death of the session's own cell."""

    def __init__(self, runner: TaskRunner, task: Task, job: JobRecord) -> None:
        super().__init__(runner.reporter, job, runner, task.rung, [0], self._evaluated)
        self._runner, self._task = runner, task

    def tells(self, error: BaseException) -> bool:
        """Not of another cell, that a callback of the caller has used."""
        return isinstance(error, CellDied) and not self._runner.alive

    @property
    def problem(self) -> str:
        """With the method's name."""
        return f"{self._task.method}: {self.error}" if self.error else ""

    def _evaluated(self) -> BatchRecord | None:
        return self._task.batch(self._runner.config.n_batch)
