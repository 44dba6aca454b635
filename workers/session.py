"""A session: what a decoder's memory holds, and how a new cell is given the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from crumplezone.errors import CellDied, CellRefused, CrumplezoneError, InputError, MemoryLostError
from crumplezone.workers.calls import Adapters, Ask, RefusedError, Rows
from crumplezone.workers.columns import Columns, Int32
from crumplezone.workers.incident import Reporter
from crumplezone.workers.journal import ALL, Copied, Decoded, Journal, Loaded, Operation, Removed, Shifted
from crumplezone.workers.protocol import MemoryOperation, Remembered, Span
from crumplezone.workers.runner import Runner

_T = TypeVar("_T")
_NOTHING = Ask(logits=False)


class Session:
    """The native cell of a decoder, with the memory that every committed call has left in it.

    Args:
        runner: The cell, replaced when it has died.
        reporter: Where a crash in the middle of a memory operation goes.
        checkpoint_every: After so many tokens, keep the state of every sequence in their place; 0: never.
    """

    def __init__(self, runner: Runner, reporter: Reporter, checkpoint_every: int = 0) -> None:
        self.runner = runner
        self._reporter = reporter
        self._checkpoint_every = checkpoint_every
        self._journal = Journal()
        self._adapters: Adapters | None = None
        self._pid: int | None = None  # of the cell that holds this memory
        self._forget()

    @property
    def journal(self) -> Journal:
        """What a new cell would be given."""
        return self._journal

    def decode(self, columns: Columns, ask: Ask, chunk: int = 0) -> Rows:
        """Append tokens to the memory; all of them, or none.

        Raises:
            RefusedError: The return code was not 0; the memory is as it was.
            CellDied: The cell was lost; the next call gives the memory to another.
            MemoryLostError: That was not possible.
        """
        self.restore()
        try:
            rows = self.runner.send(columns, ask, chunk, fresh=False)
        except RefusedError as refused:
            self._take_back(refused.spans)
            raise
        self._note(rows.spans)
        self._journal.add(Decoded(columns))
        self._checkpoint()
        return rows

    def remove(self, seq_id: int, begin: int, end: int) -> bool:
        """Remove positions of a sequence; False if this kind of memory cannot."""

        def commit() -> None:
            whole = self.pos_max[seq_id] < 0
            self._journal.removed(seq_id, ALL if whole else begin, ALL if whole else end)

        return self._operate(MemoryOperation("remove", seq_id, begin, end), commit)

    def copy(self, source: int, target: int, begin: int, end: int) -> bool:
        """Let positions of one sequence belong to another too."""
        request = MemoryOperation("copy", source, begin, end, target)
        return self._operate(request, lambda: self._journal.add(Copied(source, target, begin, end)))

    def shift(self, seq_id: int, begin: int, end: int, delta: int) -> bool:
        """Move positions of a sequence; False if this kind of memory cannot."""
        request = MemoryOperation("shift", seq_id, begin, end, delta=delta)
        return self._operate(request, lambda: self._journal.add(Shifted(seq_id, begin, end, delta)))

    def keep(self, seq_id: int) -> bool:
        """Remove every other sequence."""
        others = set(range(len(self.pos_max))) - {seq_id}
        return self._operate(MemoryOperation("keep", seq_id), lambda: self._journal.forget(others))

    def clear(self) -> None:
        """Remove everything. Needs no cell: one that is lost has nothing left."""
        self._journal.clear()
        if self.runner.pid == self._pid:
            self._operate(MemoryOperation("clear"), lambda: None)
        else:
            self._forget()

    def save(self, seq_id: int) -> bytes:
        """The state of a sequence."""
        return self._again("saving a sequence", lambda: self.runner.save(seq_id))

    def load(self, seq_id: int, state: bytes) -> bool:
        """Replace a sequence by a saved state; False if llama.cpp refuses it: the sequence is then empty."""
        remembered = self._again("loading a sequence", lambda: self.runner.load(seq_id, state))
        self._note(remembered.spans)
        if remembered.done:
            (span,) = (span for span in remembered.spans if span.seq_id == seq_id)
            self._journal.loaded(seq_id, state, np.arange(span.begin, span.last + 1, dtype=np.int32))
        else:  # what it has left there is nobody's
            self.remove(seq_id, ALL, ALL)
        return remembered.done

    def resize(self, n_ctx: int, n_seq_max: int) -> None:
        """Change the context; what the memory holds goes over into the new one."""
        held = self.pos_min, self.pos_max
        if len(gone := np.flatnonzero(self.pos_max[n_seq_max:] >= 0)):
            limit = f"sequence {int(gone[0]) + n_seq_max} is held; remove it first"
            raise InputError("n_seq_max", n_seq_max, limit)
        self._again("changing the context", lambda: self.runner.resize(n_ctx, n_seq_max))
        self._forget()
        for mine, before in zip((self.pos_min, self.pos_max), held, strict=True):
            mine[: len(before)] = before[:n_seq_max]
        self._pid = None
        self.restore()

    def adapt(self, adapters: Adapters) -> None:
        """Use adapters from now on, in every cell."""
        self._again("setting adapters", lambda: self.runner.adapt(adapters))
        self._adapters = adapters

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Let the cell be used for something else; it is given its memory back when that is needed."""
        self._pid = None
        try:
            yield
        finally:
            self._pid = None

    def restore(self) -> None:
        """Have a running cell with this memory.

        Raises:
            MemoryLostError: It could not be given its memory; the memory is empty now.
        """
        if self.runner.start().pid == self._pid:
            return
        expected = self.pos_max.copy()
        problem: object = None
        for chunk in (0, 1):  # a crash on the way: once more, in another cell, a token at a time
            try:
                self._replay(chunk)
            except CellDied as died:
                problem = self._report(died, "restoring memory", "it was tried again, token by token")
            except (RefusedError, CellRefused) as refused:
                problem = refused
                self._drop()
            else:
                self._pid = self.runner.pid
                if not self._journal or (self.pos_max == expected).all():
                    return
                problem = "its positions are not what they were"
        self._journal.clear()
        self._drop()
        raise MemoryLostError(str(problem))

    def _replay(self, chunk: int) -> None:
        self._forget()
        self.runner.operate(MemoryOperation("clear"))
        if self._adapters:
            self.runner.adapt(self._adapters)
        for operation in self._journal.replay():
            self._note(self._do(operation, chunk))

    def _do(self, operation: Operation, chunk: int) -> Sequence[Span]:
        match operation:
            case Decoded(columns):
                n_batch = chunk or (len(columns) if columns.coupled else self.runner.info.n_batch)
                quiet = columns.quiet()
                return self.runner.send(quiet, _NOTHING, n_batch, fresh=False).spans
            case Removed(seq_id, begin, end):
                return self.runner.operate(MemoryOperation("remove", seq_id, begin, end)).spans
            case Copied(source, target, begin, end):
                return self.runner.operate(MemoryOperation("copy", source, begin, end, target)).spans
            case Shifted(seq_id, begin, end, delta):
                return self.runner.operate(MemoryOperation("shift", seq_id, begin, end, delta=delta)).spans
            case Loaded(seq_id, state):
                return self.runner.load(seq_id, state).spans

    def _operate(self, request: MemoryOperation, commit: Callable[[], None]) -> bool:
        remembered: Remembered = self._again(request.name, lambda: self.runner.operate(request))
        self._note(remembered.spans)
        if remembered.done:
            commit()
        return remembered.done

    def _again(self, doing: str, work: Callable[[], _T]) -> _T:
        """Do something in a cell that has the memory, and once more in another if the first one dies."""
        self.restore()
        try:
            return work()
        except CellDied as died:
            self._report(died, doing, "it was done again in a new cell")
        self.restore()
        try:
            return work()
        except CellDied as died:
            path = self._report(died, doing, "it failed")
            raise CrumplezoneError(f"llama.cpp died twice while {doing}; report: {path}") from died

    def _take_back(self, spans: Sequence[Span]) -> None:
        """After a refusal: what was appended before it (rc 2, or a chunk of several) is removed again."""
        for span in spans:
            before = int(self.pos_max[span.seq_id])
            if span.last == before:
                continue
            request = MemoryOperation("remove", span.seq_id, before + 1, ALL)
            try:
                if self.runner.operate(request).done:
                    continue
            except CellDied as died:
                self._report(died, "taking back a part of a batch", "a new cell is given the memory")
            self._drop()  # a recurrent memory cannot be cut: it is given to another cell
            return

    def _checkpoint(self) -> None:
        if not 0 < self._checkpoint_every <= self._journal.n_tokens:
            return
        try:
            held = np.flatnonzero(self.pos_max >= 0).tolist()
            states = {seq_id: self.runner.save(seq_id) for seq_id in held}
        except CellDied as died:  # the tokens are still there
            self._report(died, "making a checkpoint", "the journal keeps the tokens")
            return
        positions = {seq_id: self._journal.positions(seq_id) for seq_id in states}
        for seq_id, state in states.items():
            self._journal.loaded(seq_id, state, positions[seq_id])

    def _report(self, died: CellDied, doing: str, result: str) -> str:
        runner = self.runner
        return self._reporter.file_lone(died.incident, doing, result, runner.config, runner.known)

    def _note(self, spans: Sequence[Span]) -> None:
        for span in spans:
            self.pos_min[span.seq_id], self.pos_max[span.seq_id] = span.begin, span.last

    def _drop(self) -> None:
        self.runner.close()
        self._pid = None

    def _forget(self) -> None:
        n_seq_max = self.runner.config.n_seq_max
        self.pos_min: Int32 = np.full(n_seq_max, -1, np.int32)
        self.pos_max: Int32 = np.full(n_seq_max, -1, np.int32)
