"""`Memory`: what a decoder holds of each sequence; arguments on which llama.cpp would abort are refused."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from crumplezone.errors import InputError, check_integer
from crumplezone.workers.batch.columns import Int32
from crumplezone.workers.cells.turn import Turn, in_turn
from crumplezone.workers.memory.journal import ALL, within
from crumplezone.workers.memory.session import MemorySession
from crumplezone.workers.protocol.config import INT32_MAX


class Memory:
    """The memory of a `Decoder`; names and meanings are those of ``llama_memory_*`` (include/llama.h).

    Ranges are positions from ``begin`` up to, but without, ``end``; -1 leaves a bound open. What is done here
    survives a crash: the next cell is given the same memory.

    Args:
        session: The decoder's.
        turn: Taken around every call, so that threads do not interleave.
    """

    def __init__(self, session: MemorySession, turn: Turn) -> None:
        self._session, self._turn = session, turn

    @property
    @in_turn
    def next_positions(self) -> Int32:
        """Where each sequence goes on: int32, shape (n_seq_max,)."""
        return self._session.pos_max + 1

    @in_turn
    def pos_min(self, seq_id: int) -> int:
        """The smallest position of a sequence, -1 if it is empty."""
        return int(self._session.pos_min[self._sequence("seq_id", seq_id)])

    @in_turn
    def pos_max(self, seq_id: int) -> int:
        """The largest position of a sequence, -1 if it is empty."""
        return int(self._session.pos_max[self._sequence("seq_id", seq_id)])

    @in_turn
    def clear(self) -> None:
        """Remove every sequence."""
        self._session.clear()

    @in_turn
    def remove(self, seq_id: int, begin: int = ALL, end: int = ALL) -> bool:
        """Remove positions of a sequence.

        Returns:
            False if this kind of memory cannot: a recurrent one removes whole sequences only.

        Raises:
            InputError: A value is out of range.
        """
        self._range(begin, end)
        return self._session.remove(self._sequence("seq_id", seq_id), int(begin), int(end))

    @in_turn
    def copy(self, source: int, target: int) -> None:
        """Let everything of one sequence belong to another too; what that one held is gone.

        (With a context of several streams, as this one, llama.cpp aborts on copies of a part.)

        Raises:
            InputError: A value is out of range.
        """
        source, target = self._sequence("source", source), self._sequence("target", target)
        if source == target:
            raise InputError("target", target, "must be another sequence than the source")
        self._session.remove(target, ALL, ALL)
        if self._session.pos_max[source] >= 0:
            self._session.copy(source, target, ALL, ALL)

    @in_turn
    def keep(self, seq_id: int) -> None:
        """Remove every other sequence.

        Raises:
            InputError: The id is out of range.
        """
        self._session.keep(self._sequence("seq_id", seq_id))

    @in_turn
    def shift(self, seq_id: int, begin: int, end: int, delta: int) -> bool:
        """Move positions of a sequence; remove first what lies where they go.

        Returns:
            False if this kind of memory cannot.

        Raises:
            InputError: A value is out of range, or positions would be negative or double.
        """
        seq_id = self._sequence("seq_id", seq_id)
        self._range(begin, end)
        check_integer("delta", delta, -INT32_MAX, INT32_MAX)
        held = self._session.journal.positions(seq_id)
        self._check_shift(held, within(held, begin, end), int(delta))
        return self._session.shift(seq_id, int(begin), int(end), int(delta))

    @in_turn
    def save(self, seq_id: int) -> bytes:
        """The state of a sequence, for `load` into a decoder with the same model and context.

        Raises:
            InputError: The id is out of range.
        """
        return self._session.save(self._sequence("seq_id", seq_id))

    @in_turn
    def load(self, seq_id: int, state: bytes) -> None:
        """Replace a sequence by a saved state.

        Raises:
            InputError: The id is out of range, or llama.cpp does not accept the state; the sequence is then
                empty.
        """
        seq_id = self._sequence("seq_id", seq_id)
        if not isinstance(state, bytes) or not state:
            raise InputError("state", type(state).__name__, "must be the bytes that save() gave")
        if not self._session.load(seq_id, state):
            limit = "is no state of this model and context, or cut short; the sequence is empty now"
            raise InputError("state", f"{len(state)} bytes", limit)

    def _sequence(self, field: str, seq_id: int) -> int:
        n_seq_max = len(self._session.pos_max)
        check_integer(field, seq_id, 0, n_seq_max - 1, " (n_seq_max - 1)")
        return int(seq_id)

    @staticmethod
    def _range(begin: int, end: int) -> None:
        check_integer("begin", begin, ALL, INT32_MAX)
        check_integer("end", end, ALL, INT32_MAX)

    @staticmethod
    def _check_shift(held: Int32, moves: npt.NDArray[np.bool_], delta: int) -> None:
        moved = held[moves].astype(np.int64) + delta
        if len(moved) and not 0 <= moved.min() <= moved.max() <= INT32_MAX:
            raise InputError("delta", delta, f"moves positions to {moved.min()}..{moved.max()}")
        double = np.intersect1d(moved, held[~moves])
        if len(double):
            raise InputError("delta", delta, f"position {double[0]} is held already; remove it first")
