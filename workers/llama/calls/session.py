"""Supervisor side of `Llama`: its cells, and whose call they are at."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from functools import partial
from typing import Any

from crumplezone.errors import UsageError
from crumplezone.sandbox.host.errands import BesideLog
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.cells.factory import Cells
from crumplezone.workers.cells.turn import Turn
from crumplezone.workers.llama.calls.checkpoint import Checkpoint
from crumplezone.workers.llama.calls.client import Decode, LlamaClient
from crumplezone.workers.llama.calls.lock import CallLock
from crumplezone.workers.llama.calls.runner import END, RAISED, TaskRunner
from crumplezone.workers.llama.calls.task import LlamaSnapshot, Task
from crumplezone.workers.protocol.llama import LlamaConfig, LlamaInfo, LlamaSeedInfo

_SPARE_MAX = 2**29  # bytes of a context: a larger one is made a second time only for who asks for it

_log = BesideLog(logging.getLogger("crumplezone"))


class Session:
    """What a `Llama` is on this side: its cells, and where its calls stand.

    Args:
        config: Of its cells.
        cells: Where they come from, and what holds for all of them.
        spares: As the caller gave it; None: one, unless it were dear.

    Attributes:
        runner: Runs the calls.

    Raises:
        ModelError, CrumplezoneError: No cell can be had for the model.
    """

    def __init__(self, config: LlamaConfig, cells: Cells, spares: int | None) -> None:
        self._llama, self._cells = config, cells
        self._turn = Turn("Llama")  # for one exchange
        self._lock = CallLock()
        self._cautious = self._native = self._made(config.careful(), 0, Rung.TOKEN)
        try:
            self._native = self._made(config, self._spares(spares), Rung.NATIVE)
            self._native.start()
        except BaseException:
            self.close()
            raise
        self.runner = TaskRunner(
            self._native,
            self._cautious,
            cells.reporter,
            Checkpoint(cells.limits.memory),
            restorable=config.restorable and not self.info.cell.recurrent,
            seed=config.parameters["seed"] or 0xFFFFFFFF,
        )
        self.snapshot.chat_format = self.info.chat_format

    def _made(self, config: LlamaConfig, spares: int, rung: Rung) -> LlamaClient:
        source = self._cells.source("llama", config, spares=spares, owner="Llama", refusals=RAISED)
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
    def snapshot(self) -> LlamaSnapshot:
        """What the `Llama` is between two calls."""
        return self.runner.snapshot

    @property
    def processes(self) -> dict[str, list[int]]:
        """Process ids: of the "zygote", the "cell" and the "spares"."""
        zygote = self._cells.zygote
        known = {"zygote": zygote.pid if zygote else None, "cell": self.runner.client.pid}
        found = {name: [pid] if pid else [] for name, pid in known.items()}
        with self._turn.passing():
            return found | {"spares": self._native.spare_pids}

    def wait_for_spares(self, timeout: float) -> bool:
        """Wait until every spare is there; False if that takes longer (seconds), or none is made any more."""
        with self._turn.passing():
            return self._native.wait_for_spares(timeout)

    def call(self, task: Task, kind: Decode) -> Any:
        """Run a task to its end.

        Args:
            task: That is no iterator.
            kind: Decodes its value.
        """
        self._check()
        with self._turn.passing():
            return self._lock.run(task, lambda: self._turn.run(lambda: self.runner.call(task, kind)))

    def query(self, task: Task, kind: Decode) -> Any:
        """Run a task that changes nothing, even while another is suspended or asks."""
        self._turn.check_open()
        callbacks = self.runner.callbacks
        if callbacks.running and self._turn.mine():  # one of the caller's has asked
            with callbacks.asking():
                return self.runner.query(task, kind, asked=True)
        return self._turn.run(lambda: self.runner.query(task, kind))

    def open(self, task: Task) -> None:
        """Make the iterator of a task now, for the errors that its making has."""
        self._check()
        with self._turn.passing():
            self._lock.run(task, lambda: self._turn.run(lambda: self.runner.open(task)))

    def stream(self, task: Task, kind: Decode) -> Generator[Any, list[int] | None, None]:
        """The items of a task that is an iterator."""
        sent: list[int] | None = None
        try:
            while True:
                self._check()
                with self._turn.passing():
                    self._lock.take(task)
                item = self._turn.run(partial(self.runner.pull, task, sent, kind))
                if item is END:
                    return
                sent = yield item
        finally:
            task.has_turn = False
            with self._turn.passing():
                self._lock.release(task)

    def close(self) -> None:
        """End the cells and finish the reports. Idempotent; see `Turn.close`.

        It waits for an exchange of another thread. A call of this thread ends with a `UsageError`.
        """
        self._turn.close(self._release)

    def flush_reports(self) -> None:
        """Wait until the reports of all crashes so far are on disk."""
        with self._turn.passing():
            self._cells.reporter.flush(kept=True)

    def _release(self) -> None:
        with contextlib.ExitStack() as stack:  # from the last: each is done, whatever the others raise
            stack.callback(self._cells.close)  # it reaps those that are being examined
            stack.callback(self._cells.reporter.close)
            stack.callback(self._cautious.close)
            stack.callback(self._native.close)
            stack.callback(self._cells.stop)  # before its cells are reaped, which it might not answer
            stack.callback(self._lock.close)

    def _check(self) -> None:
        self._turn.check_open()
        if self.runner.callbacks.running and self._turn.mine():
            raise UsageError("a logits processor or stopping criterion may only tokenize and detokenize")
        self._turn.check()  # before the lock: this thread would take it over from its own call
