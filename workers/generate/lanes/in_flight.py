"""Supervisor side of generating: the prompts in flight in one cell, through crashes to their completions."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from crumplezone.errors import CellDied, CellRefused, CrumplezoneError, InputError, SequenceError
from crumplezone.reports.records.report import BatchRecord
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.generate.lanes.prompts import PromptReader
from crumplezone.workers.generate.lanes.running import Joining, Running, refuse
from crumplezone.workers.generate.requests.jobs import PromptJob, drop, fail
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.rungs import SafeRungs
from crumplezone.workers.memory.session import MemorySession
from crumplezone.workers.protocol.generate.messages import Generated

STEPS = 8  # native calls per control message: what a crash can cost is that much decoding again


class Generation:
    """Prompts over the sequences of one native cell: they come and go at any step.

    Args:
        session: Holds the cell; what its memory held is gone when this has used it.
        safe_rungs: The safe rungs, or None to fail with the native rung.
        reporter: Where crashes go.
        width: Most prompts in flight.
    """

    def __init__(
        self, session: MemorySession, safe_rungs: SafeRungs | None, reporter: Reporter, width: int
    ) -> None:
        self._session, self._safe_rungs, self._reporter = session, safe_rungs, reporter
        self._client = session.client
        self._prompts = PromptReader(session.client, reporter)
        self._free = list(range(width))  # a heap
        self._running: dict[int, Running] = {}
        self._joining: list[int] = []  # in flight, but the cell has not been told
        self._leaving: list[int] = []  # the cell has them, and they are in flight no more
        self._known_to: Cell | None = None  # the cell that has been told of all others
        self._asked: Cell | None = None
        self._stopped = False

    @property
    def places(self) -> int:
        """How many more prompts can be in flight."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        """Whether there are prompts in flight."""
        return bool(self._running)

    def admit(self, job: PromptJob) -> None:
        """Let a prompt take a place. It ends at once if it cannot be tokenised, or fills the context."""
        try:
            tokens, room = self._prompts.read(job)
        except CellDied as died:
            path = self._prompts.report(job, died, f"prompt {job.index} crashes the tokenizer")
            named = self._reporter.written(path)
            error = SequenceError(job.index, "llama.cpp died while tokenising it", named)
            refuse(job, error, path)
        except (CellRefused, InputError) as refused:
            refuse(job, refused)
        except (CrumplezoneError, OSError, MemoryError) as refused:  # no cell, or no memory for it here
            if self._stopped:  # that is why
                raise
            refuse(job, SequenceError(job.index, str(refused) or type(refused).__name__))
        else:
            seq_id = heapq.heappop(self._free)
            self._running[seq_id] = Running(job, seq_id, tokens, min(job.sampling.max_tokens, room))
            self._joining.append(seq_id)

    def advance(self) -> None:
        """Some native calls over everything in flight; what ends is delivered."""
        for running in list(self._running.values()):
            if drop(running.job):
                self._leave(running)
        if not self._running:
            return
        case, indices = JobRecord(), [running.job.index for running in self._running.values()]
        with Attempt(self._reporter, case, self._client, Rung.NATIVE, indices, self._batch) as tried:
            generated = self._native()
        if not tried.ok:
            self._descend(case, tried.problem)
            return
        for progress in generated.progress:
            running = self._running[progress.seq_id]
            running.take(progress)
            if progress.finished:
                self._end(running)
                running.done(progress.finished, Rung.NATIVE)

    def nudge(self) -> None:
        """From any thread: have the native calls that are under way come back early."""
        if (cell := self._asked) is not None:
            cell.arena.nudge()

    def stop(self) -> None:
        """From any thread: `give_up` comes next; have what is under way come back early."""
        self._stopped = True
        self.nudge()

    def forget(self) -> None:
        """The cell was used for something else, or will be."""
        self._known_to = None

    def give_up(self, error: Exception) -> None:
        """Fail everything in flight."""
        for running in list(self._running.values()):
            self._end(running)
            fail(running.job, error)
        self._joining, self._leaving, self._known_to = [], [], None

    def _end(self, running: Running) -> None:
        """It is in flight no more, and the cell knows."""
        del self._running[running.seq_id]
        heapq.heappush(self._free, running.seq_id)

    def _leave(self, running: Running) -> None:
        """It is in flight no more, and the cell will be told."""
        self._end(running)
        if running.seq_id in self._joining:
            self._joining.remove(running.seq_id)
        else:
            self._leaving.append(running.seq_id)

    def _native(self) -> Generated:
        joins = [self._running[seq_id].join() for seq_id in self._joining]
        everything = [running.join() for running in self._running.values()]
        generated = self._ask(joins, everything, self._client.info.n_batch)
        self._joining = []
        return generated

    def _ask(self, joins: Sequence[Joining], everything: Sequence[Joining], chunk: int) -> Generated:
        """One control message. A cell that knows nothing of what is in flight is told ``everything``."""
        cell = self._client.start()
        if reset := cell is not self._known_to:
            self._session.equip()
            joins, self._leaving = everything, []
        leaves, self._leaving, self._known_to, self._asked = self._leaving, [], None, cell
        generated = self._client.generate(joins, STEPS, chunk, leaves=leaves, reset=reset)
        self._known_to = cell
        return generated

    # Crashes.

    def _batch(self) -> BatchRecord:
        """What the cell was computing."""
        joins = [running.join() for running in self._running.values()]
        return self._client.last_batch(self._client.info.n_batch, joins)

    def _descend(self, case: JobRecord, problem: str) -> None:
        """Run every prompt in flight alone, from its last delivered token, until it may join the others."""
        fallen = list(self._running.values())
        self._joining = []
        lost: list[tuple[Running, Rung, CrumplezoneError]] = []
        cured = 0
        try:
            for running in fallen:
                running.falls += 1
                self._cure(running, case, problem, lost)
                cured += not (lost and lost[-1][0] is running)
        finally:
            case.result = f"{cured} of {len(fallen)} prompts in flight were cured by {Rung.SAFE}"
            self._reporter.file(case, self._client.config, self._client.known, failed=bool(lost))
            for running, rung, error in lost:
                running.done("error", rung, error)

    def _cure(
        self,
        running: Running,
        case: JobRecord,
        problem: str,
        lost: list[tuple[Running, Rung, CrumplezoneError]],
    ) -> None:
        """Have a prompt get past the place of the crash by itself, to go on with the others; or end it."""
        error: CrumplezoneError | None
        if self._safe_rungs is None:
            what = f"prompt {running.job.index}: {problem}; safe_fallback is off"
            reason, rung, error = None, Rung.NATIVE, CrumplezoneError(what)
        else:
            reason, rung, error = self._safe_rungs.attempt(
                running.job.index,
                case,
                lambda chunk: self._alone(running, chunk),
                lambda chunk: self._client.last_batch(chunk, [running.join()]),
            )
        running.reports += [path for path in case.reports if path not in running.reports]
        if reason == "":
            self._leaving.append(running.seq_id)  # only to come back with the others
            self._joining.append(running.seq_id)
            return
        if error and self._stopped:  # there may be no cell any more: it is given up next
            return
        self._end(running)
        if error:
            lost.append((running, rung, error))
        else:
            running.done(str(reason), rung)

    def _alone(self, running: Running, chunk: int) -> str:
        """Why it finished; or an empty string: it is past the first crash that it took part in, or unwanted.

        So a batch-only crash costs the others no more than a few steps. Whoever falls twice, or needs to be
        read token by token, stays alone to its end.
        """
        returns = running.falls == 1 and chunk > 1
        enough = len(running.produced) + STEPS + 1
        joins = [running.join()]
        while not (self._stopped or running.job.unwanted):
            generated = self._ask(joins, [running.join()], chunk)
            for progress in generated.progress:
                running.take(progress)
                if progress.finished:
                    return progress.finished
            if returns and len(running.produced) >= enough:
                break
            joins = []
        return ""
