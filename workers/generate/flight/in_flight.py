"""Supervisor side of generating: the prompts in flight in one cell, through crashes to their completions."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from crumplezone.errors import CellDied, CellRefused, CrumplezoneError, InputError, SequenceError
from crumplezone.reports.records.report import BatchRecord, Outcome
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.workers.batch.call import RefusedError
from crumplezone.workers.batch.results import Rung
from crumplezone.workers.generate.flight.places import Places
from crumplezone.workers.generate.flight.prompts import PromptReader
from crumplezone.workers.generate.flight.recovery import STEPS, Move, Own, Recovery
from crumplezone.workers.generate.flight.running import Running, refuse
from crumplezone.workers.generate.requests.jobs import PromptJob, drop, fail
from crumplezone.workers.incidents.attempt import Attempt
from crumplezone.workers.incidents.deaths import was_killed
from crumplezone.workers.incidents.job import JobRecord
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.ladder.rungs import SafeRungs
from crumplezone.workers.memory.session import MemorySession
from crumplezone.workers.protocol.generate.messages import Generated

_NOWHERE = -1  # a place that there is not
_GLANCE = 0.05  # seconds: while a report is written, somebody may come with a prompt


@dataclass
class _Lost:
    """A prompt that failed; its caller is told when the reports are there, which the error may name."""

    running: Running
    rung: Rung
    error: Callable[[], CrumplezoneError]
    written: threading.Event = field(default_factory=threading.Event)


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
        self._places = Places(width)
        self._numbers = itertools.count()
        self._running: dict[int, Running] = {}  # by a number that no other one ever has
        self._recovery = Recovery()
        self._inside: dict[int, Running] = {}  # by sequence: what runs in the cell that is known
        self._known_to: Cell | None = None
        self._asked: Cell | None = None
        self._stopped = False
        # Of the latest crashes, until everybody is past their place.
        self._case: JobRecord | None = None
        self._fallen: dict[int, int] = {}  # who took part, by number, and their indices
        self._since = 0.0
        self._lost: list[_Lost] = []
        self._unwritten: list[_Lost] = []  # their case was handed over

    @property
    def places(self) -> int:
        """How many more prompts can be in flight."""
        return len(self._places)

    @property
    def busy(self) -> bool:
        """Whether there are prompts in flight, or some whose errors are to be told."""
        return bool(self._running or self._unwritten)

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
            self._enter(Running(job, _NOWHERE, tokens, min(job.sampling.max_tokens, room)))

    def advance(self) -> None:
        """Some native calls over what is in flight, or a part of it; what ends is delivered."""
        self._tell_errors()
        for number, running in list(self._running.items()):
            if drop(running.job):
                self._end(number)
        self._settle()
        if turn := self._recovery.turn():
            if turn.alone:
                self._cure(turn.keys[0])
            else:
                self._run(turn)
            self._settle()

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
        self._places.forget()

    def give_up(self, error: Exception) -> None:
        """Fail everything in flight."""
        given_up = list(self._running.values())
        for number in list(self._running):
            self._end(number)
        lost, self._lost, self._unwritten = self._lost + self._unwritten, [], []
        if self._case:
            self._file(self._case, f"given up: {error}")
        self._recovery, self._inside, self._known_to = Recovery(), {}, None
        for running in given_up:
            fail(running.job, error)
        for each in lost:
            each.running.done("error", each.rung, each.error())

    def _enter(self, running: Running) -> None:
        """Take a place, unless it is known to crash."""
        blame, job = self._reporter.blame, running.job
        if not blame.empty and (blamed := blame.known(self._names(running))):
            path = self._reporter.there(str(self._reporter.store.path(blamed.report)))
            refuse(job, SequenceError(job.index, blamed.problem, path), *filter(None, [path]))
            return
        number = next(self._numbers)
        running.seq_id = self._places.take(running.prompt_tokens)
        self._running[number] = running
        self._recovery.add(number)

    def _names(self, running: Running) -> tuple[bytes, ...]:
        """What it is remembered by, should it crash alone."""
        made = self._session.adapters
        adapters = (made.lora, made.layers, made.vector.tobytes()) if made else ()
        sampling = running.join()[0].sampling
        return self._reporter.blame.names(running.prompt_tokens, sampling, self._client.config, *adapters)

    def _end(self, number: int, *, finished: bool = False) -> None:
        """It is in flight no more. A cell that still has it will be told."""
        running = self._running.pop(number)
        self._places.give(running.seq_id, running.tokens)
        self._recovery.drop(number, finished=finished)

    def _run(self, turn: Move) -> None:
        """One control message for those whose turn it is."""
        group = {number: self._running[number] for number in turn.keys}
        case, indices = self._case or JobRecord(), [running.job.index for running in group.values()]
        chunk = 1 if turn.rung is Rung.TOKEN else self._client.n_batch
        batch = functools.partial(self._batch, group.values(), chunk)
        with Attempt(self._reporter, case, self._client, turn.rung, indices, batch, partial=True) as tried:
            generated = self._ask(group.values(), chunk)
        if not tried.ok:
            self._fell(group, case, tried)
            return
        reasons = self._take(group.values(), generated)
        self._recovery.advanced({number: len(running.produced) for number, running in group.items()})
        ended = [number for number, running in group.items() if running.seq_id in reasons]
        for number in ended:
            self._end(number, finished=True)
        self._settle()  # before those are told who may read the reports then
        for number in ended:
            group[number].done(reasons[group[number].seq_id], turn.rung)

    def _take(self, group: Collection[Running], generated: Generated) -> dict[int, str]:
        """Deliver what came back; why the sequences finished that did."""
        running = {each.seq_id: each for each in group}
        reasons: dict[int, str] = {}
        for progress in generated.progress:
            running[progress.seq_id].take(progress)
            if progress.finished:
                reasons[progress.seq_id] = progress.finished
                del self._inside[progress.seq_id]
        return reasons

    def _ask(self, group: Collection[Running], chunk: int) -> Generated:
        """One control message about a group: whoever else the cell has stands still meanwhile."""
        cell = self._client.start()
        if reset := cell is not self._known_to:
            self._session.equip()
            self._inside = {}
            self._places.forget()
        wanted = {running.seq_id: running for running in group}
        leaves = [seq_id for seq_id, running in self._inside.items() if wanted.get(seq_id) is not running]
        joins = [each.join() for seq_id, each in wanted.items() if self._inside.get(seq_id) is not each]
        self._known_to, self._asked = None, cell
        generated = self._client.generate(joins, STEPS, chunk, leaves=leaves, reset=reset)
        self._known_to, self._inside = cell, wanted
        return generated

    # Crashes.

    def _batch(self, group: Collection[Running], chunk: int) -> BatchRecord:
        """What the cell was computing."""
        return self._client.last_batch(chunk, [running.join() for running in group])

    def _fell(self, group: dict[int, Running], case: JobRecord, tried: Attempt) -> None:
        """The native rung failed: see who goes on with whom."""
        self._begin(group, case)
        if tried.report:
            for running in group.values():
                running.reports.append(tried.report)
        if self._safe_rungs is None:
            for number, running in group.items():
                problem = f"prompt {running.job.index}: {tried.problem}; safe_fallback is off"
                self._lose(number, Rung.NATIVE, functools.partial(CrumplezoneError, problem))
        elif tried.died:
            self._recovery.died(group, _own(tried.died))
        elif isinstance(tried.error, RefusedError):
            self._recovery.died(group, lambda: True)
        else:  # there is no cell, or no memory
            self._recovery.scatter(group)

    def _begin(self, group: dict[int, Running], case: JobRecord) -> None:
        self._case, self._since = case, time.perf_counter()
        self._fallen |= {number: running.job.index for number, running in group.items()}

    def _cure(self, number: int) -> None:
        """Have a prompt get past the place of the crash by itself; or end it."""
        running, case = self._running[number], self._case or JobRecord()
        self._begin({number: running}, case)
        known = len(case.crashes)
        assert self._safe_rungs is not None
        reason, rung, failure = self._safe_rungs.attempt(
            running.job.index,
            case,
            lambda chunk: self._alone(running, chunk),
            lambda chunk: self._batch([running], chunk),
        )
        running.reports += case.reports[known:]
        if failure is None:
            self._recovery.cured(number, rung, len(running.produced))
            if reason:
                self._end(number, finished=True)
                self._settle()
                running.done(reason, rung)
        elif not self._stopped:  # else there may be no cell any more: it is given up next
            self._recovery.lost(number)
            if failure.poison and failure.report:
                self._remember(running, Path(failure.report).name)
            self._lose(number, rung, lambda: failure.error(self._reporter.there(failure.report)))

    def _remember(self, running: Running, report: str) -> None:
        """It will crash again: be it asked for once more, it fails at once."""
        chance = bool(running.produced) and not running.job.sampling.greedy
        for name in self._names(running)[chance:][:1]:  # with its seed, if that has led to the crash
            self._reporter.tell(functools.partial(self._reporter.blame.remember, name, report))

    def _alone(self, running: Running, chunk: int) -> str:
        """Why it finished; or an empty string: it is past the place of the crash, or unwanted."""
        enough = len(running.produced) + STEPS + 1
        while not (self._stopped or running.job.unwanted):
            if reasons := self._take([running], self._ask([running], chunk)):
                return reasons[running.seq_id]
            if len(running.produced) >= enough:
                break
        return ""

    def _lose(self, number: int, rung: Rung, error: Callable[[], CrumplezoneError]) -> None:
        self._lost.append(_Lost(self._running[number], rung, error))
        self._end(number)

    def _settle(self) -> None:
        """Note who has got past a crash; when all have, hand the case over."""
        case = self._case
        if case is None:
            return
        for passed in self._recovery.take_passed():
            now = time.perf_counter()
            indices = [self._fallen[number] for number in passed]
            case.step(Rung.NATIVE, Outcome.OK, indices, ms=(now - self._since) * 1000)
            self._since = now
        if self._recovery.settled:
            n = len(self._fallen)
            failed = [lost.running.job.index for lost in self._lost]
            rest = f"; failed: prompt {', '.join(map(str, failed))}" if failed else ""
            self._file(case, f"{n - len(failed)} of {n} prompts in flight went on{rest}")

    def _file(self, case: JobRecord, result: str) -> None:
        case.result = result
        self._reporter.file(case, self._client.config, self._client.known)
        for lost in self._lost:
            self._reporter.tell(lost.written.set)
        self._unwritten += self._lost
        self._case, self._fallen, self._lost = None, {}, []

    def _tell_errors(self) -> None:
        """Give callers the errors whose reports are there; wait a little if there is nothing else to do."""
        if self._unwritten and not self._running:
            self._unwritten[0].written.wait(_GLANCE)
        waiting, self._unwritten = self._unwritten, []
        for lost in waiting:
            if lost.written.is_set():
                lost.running.done("error", lost.rung, lost.error())
            else:
                self._unwritten.append(lost)


def _own(died: CellDied) -> Own:
    """Whether nobody killed the cell, as `Recovery` asks for it."""
    return functools.cache(lambda: not was_killed(died))
