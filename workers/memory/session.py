"""A session: what a decoder's memory holds, and how a new cell is given the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from crumplezone.errors import (
    CellDied,
    CellRefused,
    CrumplezoneError,
    InputError,
    MemoryLostError,
    ShortageError,
)
from crumplezone.sandbox.autopsy.incident import Incident
from crumplezone.sandbox.cells.cell import Cell
from crumplezone.workers.batch.call import DecodeOptions, RefusedError, Rows
from crumplezone.workers.batch.columns import Columns, Int32
from crumplezone.workers.cells.decode_client import DecodeClient
from crumplezone.workers.incidents.deaths import Deaths, retried
from crumplezone.workers.incidents.reporter import Reporter
from crumplezone.workers.memory.journal import (
    ALL,
    Appended,
    Copied,
    Journal,
    Loaded,
    Operation,
    Removed,
    Shifted,
)
from crumplezone.workers.model.adapters import Adapters
from crumplezone.workers.protocol.messages import MemoryOperation, Remembered, Span

_T = TypeVar("_T")
_NOTHING = DecodeOptions(logits=False)


def _request(operation: Removed | Copied | Shifted) -> MemoryOperation:
    """What a cell is asked to do."""
    match operation:
        case Removed(seq_id, begin, end):
            return MemoryOperation("remove", seq_id, begin, end)
        case Copied(source, target, begin, end):
            return MemoryOperation("copy", source, begin, end, target)
        case Shifted(seq_id, begin, end, delta):
            return MemoryOperation("shift", seq_id, begin, end, delta=delta)


class MemorySession:
    """The native cell of a decoder, with the memory that every committed call has left in it.

    Args:
        client: The cell, replaced when it has died.
        reporter: Where a crash in the middle of a memory operation goes.
        checkpoint_every: After so many tokens, keep the state of every sequence in their place; 0: never.
        adapters: That every cell is to have.
    """

    def __init__(
        self,
        client: DecodeClient,
        reporter: Reporter,
        checkpoint_every: int = 0,
        adapters: Adapters | None = None,
    ) -> None:
        self.client = client
        self._reporter = reporter
        self._checkpoint_every = checkpoint_every
        self._journal = Journal()
        self._adapters = adapters
        self._cell: Cell | None = None  # the one that holds this memory
        self._forget()

    @property
    def journal(self) -> Journal:
        """What a new cell would be given."""
        return self._journal

    def decode(self, columns: Columns, ask: DecodeOptions, chunk: int = 0) -> Rows:
        """Append tokens to the memory; all of them, or none.

        Raises:
            RefusedError: The return code was not 0; the memory is as it was.
            CellDied: The cell was lost; the next call gives the memory to another.
            MemoryLostError: That was not possible.
        """
        self.restore()
        try:
            rows = self.client.send(columns, ask, chunk, fresh=False)
        except RefusedError as refused:
            self._take_back(refused.spans)
            raise
        except BaseException:
            self._cell = None  # a part may have arrived: before the next call it is given its memory anew
            raise
        self._note(rows.spans)
        self._journal.add(Appended(columns.without(())))  # a token of no sequence is in nobody's memory
        self._checkpoint()
        return rows

    def remove(self, seq_id: int, begin: int, end: int) -> bool:
        """Remove positions of a sequence; False if this kind of memory cannot."""

        def commit() -> None:
            whole = self.pos_max[seq_id] < 0
            self._journal.removed(seq_id, ALL if whole else begin, ALL if whole else end)

        return self._operate(_request(Removed(seq_id, begin, end)), commit)

    def copy(self, source: int, target: int, begin: int, end: int) -> bool:
        """Let positions of one sequence belong to another too."""
        return self._append(Copied(source, target, begin, end))

    def shift(self, seq_id: int, begin: int, end: int, delta: int) -> bool:
        """Move positions of a sequence; False if this kind of memory cannot."""
        return self._append(Shifted(seq_id, begin, end, delta))

    def keep(self, seq_id: int) -> None:
        """Remove every other sequence.

        One by one: llama_memory_seq_keep looks at the stream of its own sequence only, where no other is
        (llama_kv_cache::seq_keep, seen in 0.3.36).
        """
        for other in np.flatnonzero(self.pos_max >= 0).tolist():
            if other != seq_id:
                self.remove(other, ALL, ALL)

    def clear(self) -> None:
        """Remove everything. Needs no cell: one that is lost has nothing left."""
        self._journal.clear()
        self._forget()
        if self._cell is not None and self._cell.alive:
            self._operate(MemoryOperation("clear"), lambda: None)

    def save(self, seq_id: int) -> bytes:
        """The state of a sequence."""
        return self._again("saving a sequence", lambda: self.client.save(seq_id))

    def load(self, seq_id: int, state: bytes) -> bool:
        """Replace a sequence by a saved state; False if llama.cpp refuses it: the sequence is then empty."""
        remembered = self._again("loading a sequence", lambda: self.client.load(seq_id, state))
        self._note(remembered.spans)
        if self.pos_max[seq_id] < 0:
            self._journal.removed(seq_id, ALL, ALL)
        else:
            positions = np.arange(self.pos_min[seq_id], self.pos_max[seq_id] + 1, dtype=np.int32)
            self._journal.loaded(seq_id, state, positions)
        return remembered.done

    def resize(self, n_ctx: int, n_seq_max: int) -> None:
        """Change the context; what the memory holds goes over into the new one, or nothing is changed.

        Raises:
            InputError: The memory does not fit.
            ModelError: No such context can be made.
        """
        if len(gone := np.flatnonzero(self.pos_max[n_seq_max:] >= 0)):
            limit = f"sequence {int(gone[0]) + n_seq_max} is held; remove it first"
            raise InputError("n_seq_max", n_seq_max, limit)
        before = self.client.config
        if problem := self._move(n_ctx, n_seq_max):
            if lost := self._move(before.n_ctx, before.n_seq_max):
                self._lose(lost)
            limit = f"the memory cannot go over: {problem}. Remove what is not needed; nothing was changed"
            raise InputError("n_ctx, n_seq_max", (n_ctx, n_seq_max), limit)

    def adapt(self, adapters: Adapters) -> None:
        """Use adapters from now on, in every cell.

        Raises:
            InputError: One of them is none of this model. Nothing is changed.
        """
        if self._journal.n_tokens:  # computed without them, and so it stays
            self._again("making a checkpoint", self._freeze)
        self._again("setting adapters", lambda: self.client.adapt(adapters))
        self._adapters = adapters

    @property
    def adapters(self) -> Adapters | None:
        """What every cell has."""
        return self._adapters

    def equip(self) -> None:
        """Have the adapters in the running cell, whatever its memory holds.

        Raises:
            InputError: One of them is gone.
            CellDied: The cell was lost.
        """
        if self._adapters:
            self.client.adapt(self._adapters)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Let the cell be used for something else; it is given its memory back when that is needed."""
        self._cell = None
        try:
            yield
        finally:
            self._cell = None

    def restore(self) -> None:
        """Have a running cell with this memory.

        Raises:
            MemoryLostError: It could not be given its memory; the memory is empty now.
            ModelError: No cell can be had; the next call will try again.
        """
        if problem := self._give_back():
            self._lose(problem)

    def _give_back(self) -> str:
        """Why a running cell could not be given this memory, or an empty string: it has it."""
        if self.client.start() is self._cell:
            return ""
        deaths, chunk, again = Deaths(own=1), 0, True
        while again:
            path = None
            try:
                problem = self._replay(chunk)
            except CellDied as died:
                path = self._report(died, "restoring memory", "it was tried again, token by token")
                problem, again = str(died), deaths.again(died)
            except (RefusedError, CellRefused) as refused:
                problem, again = str(refused), not chunk
                self._drop()
            else:
                if not problem:
                    self._cell = self.client.cell
                    return ""
                again = not chunk
            chunk = 1  # once more, in another cell, a token at a time
        named = self._reporter.written(path)
        return f"{problem}; report: {named}" if named else problem

    def _lose(self, problem: str) -> None:
        self._journal.clear()
        self._forget()
        self._drop()
        raise MemoryLostError(problem)

    def _replay(self, chunk: int) -> str:
        """Give the memory to the running cell, whatever is in it; what did not arrive, or an empty string."""
        self.client.operate(MemoryOperation("clear"))
        self.equip()
        arrived = np.full_like(self.pos_max, -1)
        for operation in self._journal.replay():
            remembered = self._do(operation, chunk)
            if not remembered.done:  # all but this was possible before, and so it is now
                return "a saved state is not accepted: it needs the n_seq_max that it was saved with"
            for span in remembered.spans:
                arrived[span.seq_id] = span.last
        return "" if (arrived == self.pos_max).all() else "its positions are not what they were"

    def _do(self, operation: Operation, chunk: int) -> Remembered:
        match operation:
            case Appended(columns):
                n_batch = chunk or (len(columns) if columns.coupled else self.client.info.n_batch)
                rows = self.client.send(columns.quiet(), _NOTHING, n_batch, fresh=False)
                return Remembered(done=True, spans=list(rows.spans))
            case Removed() | Copied() | Shifted():
                return self.client.operate(_request(operation))
            case Loaded(seq_id, state):
                return self.client.load(seq_id, state)

    def _move(self, n_ctx: int, n_seq_max: int) -> str:
        """Why a context of this size could not be given this memory, or an empty string: it has it."""
        self._twice("changing the context", lambda: self.client.resize(n_ctx, n_seq_max))
        held = self.pos_min, self.pos_max
        self._cell = None
        self._forget()
        n_both = min(n_seq_max, len(held[0]))
        self.pos_min[:n_both], self.pos_max[:n_both] = held[0][:n_both], held[1][:n_both]
        lengths = np.where(self.pos_max < 0, 0, self.pos_max - self.pos_min + 1)
        room = self.client.info.n_ctx_seq
        if not self.client.info.recurrent and lengths.max() > room:
            longest = int(lengths.argmax())
            return f"sequence {longest} holds {lengths[longest]} tokens, and there would be room for {room}"
        return self._give_back()

    def _append(self, operation: Copied | Shifted) -> bool:
        return self._operate(_request(operation), lambda: self._journal.add(operation))

    def _operate(self, request: MemoryOperation, commit: Callable[[], None]) -> bool:
        remembered: Remembered = self._again(request.name, lambda: self.client.operate(request))
        self._note(remembered.spans)
        if remembered.done:
            commit()
        return remembered.done

    def _again(self, doing: str, work: Callable[[], _T]) -> _T:
        """Do something in a cell that has the memory, and once more in another if the first one dies."""

        def restored() -> _T:
            self.restore()
            return work()

        return self._twice(doing, restored)

    def _twice(self, doing: str, work: Callable[[], _T]) -> _T:
        def tell(died: CellDied, again: bool) -> None:
            path = self._report(died, doing, "it was done again in a new cell" if again else "it failed")
            if not again:
                named = self._reporter.written(path)
                where = f"; report: {named}" if named else ""
                raise CrumplezoneError(f"llama.cpp died again and again while {doing}{where}") from died

        return retried(work, tell, own=1)

    def _take_back(self, spans: Sequence[Span]) -> None:
        """After a refusal: what was appended before it (rc 2, or a chunk of several) is removed again."""
        for span in spans:
            before = int(self.pos_max[span.seq_id])
            if self._cell is None or not self._cell.alive or span.last == before:
                continue
            request = MemoryOperation("remove", span.seq_id, before + 1, ALL)
            try:
                if self.client.operate(request).done:
                    continue
            except CellDied as died:
                self._report(died, "taking back a part of a batch", "a new cell is given the memory")
            self._drop()  # a recurrent memory cannot be cut: it is given to another cell

    def _checkpoint(self) -> None:
        if not 0 < self._checkpoint_every <= self._journal.n_tokens:
            return
        try:
            self._freeze()
        except CellDied as died:  # the tokens are still there
            self._report(died, "making a checkpoint", "the journal keeps the tokens")
        except ShortageError:  # likewise
            return

    def _freeze(self) -> None:
        """Keep the states of the sequences in the place of their tokens."""
        held = np.flatnonzero(self.pos_max >= 0).tolist()
        states = {seq_id: self.client.save(seq_id) for seq_id in held}
        positions = {seq_id: self._journal.positions(seq_id) for seq_id in held}
        for seq_id, state in states.items():
            self._journal.loaded(seq_id, state, positions[seq_id])

    def _report(self, died: CellDied, doing: str, result: str) -> str:
        client = self.client
        return self._reporter.file_lone(Incident.of(died), doing, result, client.config, client.known)

    def _note(self, spans: Sequence[Span]) -> None:
        for span in spans:
            self.pos_min[span.seq_id], self.pos_max[span.seq_id] = span.begin, span.last

    def _drop(self) -> None:
        self.client.discard_cell()
        self._cell = None

    def _forget(self) -> None:
        n_seq_max = self.client.config.n_seq_max
        self.pos_min: Int32 = np.full(n_seq_max, -1, np.int32)
        self.pos_max: Int32 = np.full(n_seq_max, -1, np.int32)
